"""Passes of which few hidden states are read: the MLP of the last layer is computed at these tokens only.

A judge's label and an evaluator's score are read from the state at one token per text. The attention of the last layer needs
keys and values of all tokens, but its MLP treats tokens independently, and its output at other tokens is never used. The MLP is
most of a layer: without it at other tokens, a pass over L layers takes about 1 - 2 / (3 L) of the arithmetic.

Shapes: B rows, T tokens, S tokens whose states are read, D hidden.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selfeval.backbone.adapters import BASE
from selfeval.backbone.depth import decoder_layers
from selfeval.backbone.load import LoadedModel
from selfeval.errors import ModelError, is_out_of_memory

__all__ = ["FEW", "MlpAt", "agrees_at_picked_tokens", "last_mlp"]

FEW = 0.5
"""Share of the tokens of a pass up to which picking them pays; it costs two copies."""
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def last_mlp(model: Any, depth: int | None = None) -> nn.Module | None:
    """Return the MLP of the last layer of a pass; None if the family has no layers with one.

    Args:
        model: a causal model.
        depth: Optional. Number of layers of the pass (`first_layers`). Default: all of them.
    """
    try:
        layers = decoder_layers(model)
    except ModelError:
        return None
    found = getattr(layers[(depth or len(layers)) - 1], "mlp", None)
    return found if isinstance(found, nn.Module) else None


class MlpAt(AbstractContextManager["MlpAt"]):
    """Compute a module that treats tokens independently at some tokens inside the block; its output is 0 at the others.

    Args:
        module: called with hidden states `[B, T, D]`, whose output has the same shape.
        places_S: index of each token among all tokens of the rows, B T.

    Attributes:
        calls: number of calls inside the block.
    """

    def __init__(self, module: nn.Module, places_S: Tensor) -> None:
        self._module, self._places, self.calls = module, places_S, 0
        self._shape = torch.Size()

    def __enter__(self) -> MlpAt:
        self._hooks = (
            self._module.register_forward_pre_hook(self._pick),
            self._module.register_forward_hook(self._put_back),
        )
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _pick(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states_BTD, *others = inputs
        self.calls += 1
        self._shape, self._places = states_BTD.shape, self._places.to(states_BTD.device)
        return (states_BTD.flatten(0, 1).index_select(0, self._places)[None], *others)

    def _put_back(self, module: nn.Module, inputs: tuple[Any, ...], output_1SD: Tensor) -> Tensor:
        whole = output_1SD.new_zeros(self._shape[0] * self._shape[1], self._shape[2])
        return whole.index_copy_(0, self._places, output_1SD[0]).view(self._shape)


class Passes(Protocol):
    """Interface required of a backbone."""

    loaded: LoadedModel

    def acting_as(self, role: str) -> AbstractContextManager[None]: ...

    def hidden(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor: ...


@torch.no_grad()
def agrees_at_picked_tokens(backbone: Passes) -> bool:
    """Return whether a pass at some tokens has the states of the whole pass there, measured on two short texts.

    Sums may have another order, so the states may differ by rounding: 64 times the precision of the largest state.
    """
    module, device = last_mlp(backbone.loaded.model), backbone.loaded.device
    if module is None or device.type == "meta":  # the planner follows the whole pass
        return False
    ids_BT = torch.tensor([[0, 1, 2, 3], [2, 1, 3, 0]], device=device)
    attention_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=device)
    places = torch.tensor([1, 3, 6], device=device)
    with backbone.acting_as(BASE):
        try:
            states_SD = backbone.hidden(ids_BT, attention_BT).flatten(0, 1)[places]
            with MlpAt(module, places) as block:
                found_SD = backbone.hidden(ids_BT, attention_BT).flatten(0, 1)[places]
        except _FAILURES as error:
            if is_out_of_memory(error):
                raise
            return False
    tolerance = 64 * torch.finfo(states_SD.dtype).eps * float(states_SD.abs().max())
    return block.calls == 1 and torch.allclose(found_SD, states_SD, rtol=0, atol=tolerance)
