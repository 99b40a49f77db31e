"""How a role's LoRA adapter enters a pass: each adapted layer adds what the acting role's adapter makes of its input.

PEFT injects, stores and names the adapters; which of them acts is decided here, by looking at one stack, and not by
switching flags in every layer. So a switch costs nothing, never touches `requires_grad`, one pass may carry rows of several
roles, and a layer that is run again by gradient checkpointing runs under the role that it had the first time.

Shapes: B rows in the pass, T tokens, I inputs and O outputs of a layer, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from selfeval.errors import ModelError, RoleError

__all__ = ["BASE", "Acting", "AdapterStack", "remove_adapters"]

BASE = "base"
"""Name of the bare base as a role: no adapter, no gradient."""


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one role: `start <= row < stop`."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Acting:
    """Whose pass it is: one role for any number of rows, or the role of each row."""

    name: str
    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, role: str | Sequence[str]) -> Acting:
        if isinstance(role, str):
            return cls(role)
        runs, start = [], 0
        for name, group in groupby(role):
            stop = start + len(list(group))
            runs.append(Run(name, start, stop))
            start = stop
        return cls("+".join(dict.fromkeys(role)), tuple(runs))

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.role for run in self.runs)) if self.runs else (self.name,)


class _Block(AbstractContextManager[None]):
    """Can be entered again, as a backward pass that is made again does."""

    def __init__(self, stack: list[Acting], acting: Acting) -> None:
        self._stack, self._acting = stack, acting

    def __enter__(self) -> None:
        self._stack.append(self._acting)

    def __exit__(self, *error: object) -> None:
        self._stack.pop()


class AdapterStack:
    """The blocks that are open now, innermost last, and the layers that ask it whose adapter to add."""

    def __init__(self) -> None:
        self._stack: list[Acting] = []
        self._hooked: WeakSet[nn.Module] = WeakSet()
        self.mixes_rows = True
        """False once an adapter sits on fused experts."""

    @property
    def acting(self) -> Acting | None:
        return self._stack[-1] if self._stack else None

    def block(self, acting: Acting) -> AbstractContextManager[None]:
        """Activate this role for the passes inside the block. Blocks nest, and the outer role is restored on exit."""
        return _Block(self._stack, acting)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts for a checkpointed layer's forward and its recomputation, which must use the same role."""
        acting = self.acting
        # The forward pass is already inside the role's block, which may be closed by the time of the backward pass.
        return nullcontext(), nullcontext() if acting is None else _Block(self._stack, acting)

    def attach(self, model: nn.Module) -> None:
        """Let the adapted layers of `model` ask this stack; PEFT itself adds nothing from here on.

        Raises:
            ModelError: an adapter sits on an embedding, which this version cannot train.
        """
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if module.lora_embedding_A:
                raise ModelError(
                    f"backbone.lora.targets puts an adapter on the embedding {name}; choose linear layers, e.g. all-linear"
                )
            # Without active adapters, PEFT's forward returns the output of the base layer, to which the hook below adds.
            module.set_adapter([], inference_mode=True)
            # attach runs again after each new adapter; a second hook would add the adapters twice.
            if module not in self._hooked:
                self._hooked.add(module)
                if isinstance(module, ParamWrapper):
                    self.mixes_rows = False
                    module.register_forward_pre_hook(self._adapt_parameter)
                else:
                    module.register_forward_hook(self.add_adapters)

    def _adapt_parameter(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Fused experts are no linear layer to add to: PEFT changes their parameter for the pass, for one role at a time."""
        acting = self.acting
        if acting is not None and acting.runs:
            raise RoleError("rows of several roles cannot share a forward pass if experts have adapters; run one pass per role")
        layer._active_adapter = [acting.name] if acting is not None and acting.name in layer.lora_A else []

    def __contains__(self, module: nn.Module) -> bool:
        """Whether this layer asks the stack."""
        return module in self._hooked

    def add_adapters(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of a layer with those of the acting roles' adapters added, without gradients in place.

        Args:
            layer: adapted layer.
            inputs: its input, as the only entry.
            output: of the layer without adapters.
        """
        acting = self.acting
        if acting is None or acting.name == BASE:
            return output
        if not acting.runs:
            return _adapted(layer, acting.name, inputs[0], output)
        per_row = _per_row(inputs[0], acting.runs[-1].stop)
        spans = [(run.role, slice(run.start * per_row, run.stop * per_row)) for run in acting.runs]
        return torch.cat([_adapted(layer, role, inputs[0][span], output[span]) for role, span in spans])


def remove_adapters(model: nn.Module, role: str) -> None:
    """Take the adapters of a role out; a layer that is left with none is the base's own module again."""
    for name, layer in reversed(list(model.named_modules())):  # inner ones first: those on fused experts are nested
        if not isinstance(layer, BaseTunerLayer):
            continue
        layer.set_adapter([], inference_mode=True)  # else PEFT picks another one to act, and marks its weights
        layer.delete_adapter(role)
        if not layer._all_available_adapter_names():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _per_row(x: Tensor, rows: int) -> int:
    """Entries of the first dimension that belong to one row: 1 of `[B, T, I]`, T of `[B T, I]`."""
    per_row, rest = divmod(x.shape[0], rows)
    if rest or (x.ndim > 2 and per_row != 1):
        raise RoleError(f"got roles for {rows} rows, but this forward pass has {x.shape[0]}; give one role per row")
    return per_row


def _adapted(layer: Any, role: str, x: Tensor, output: Tensor) -> Tensor:
    """`output + scaling * B A x`, the product in the adapter's own precision (fp32)."""
    if role not in layer.lora_A:
        return output
    down, up, scaling = layer.lora_A[role].weight, layer.lora_B[role].weight, layer.scaling[role]
    x = x.to(device=down.device, dtype=down.dtype)
    inner = torch.nn.functional.linear(x, down)
    # Add and scale in one kernel, without a temporary of the output's size.
    if output.dtype == up.dtype and output.device == up.device:
        rows, deltas = output.reshape(-1, output.shape[-1]), inner.reshape(-1, inner.shape[-1])
        # Without gradients into the output's own memory: nothing else holds the product of the base layer.
        add = torch.addmm if torch.is_grad_enabled() else torch.Tensor.addmm_
        flat: Tensor = add(rows, deltas, up.T, alpha=scaling)
        return flat.view(output.shape)
    # 16-bit base: compute the update in the adapter's fp32, and round it once.
    delta: Tensor = torch.nn.functional.linear(inner, up) * scaling
    return output + delta.to(device=output.device, dtype=output.dtype)
