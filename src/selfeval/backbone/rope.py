"""A longer context by scaling rotary positions (RoPE) at load time: linear, dynamic NTK and YaRN.

RoPE turns the pair i of a head of size d by the angle m theta_i at position m, with theta_i = base^(-2i/d). A model trained on
L tokens has seen no angle beyond L theta_i. With s the factor by which the context grows:

    linear    theta_i / s                              Chen et al. 2023, https://arxiv.org/abs/2306.15595, section 2.3
    dynamic   base^(-2i/d) with base s'^(d/(d-2)),     NTK-aware with s' = max(1, tokens / L) of each pass;
              times the trained base                   Peng et al. 2023, https://arxiv.org/abs/2309.00071, sections 3.1 and 3.3
    yarn      between theta_i / s and theta_i by how   Peng et al. 2023, sections 3.2 and 3.4; queries and keys are also
              often the pair turns within L            scaled by 0.1 ln s + 1

The angles are computed by transformers from `config.rope_parameters`; here those are set, checked, and refused where they
would mean nothing. Left out: models whose config scales its positions already, whose two scalings would not compose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from selfeval.config import ContextConfig
from selfeval.errors import ModelError

__all__ = ["Stretch", "check_stretch", "stretch_positions"]

_LONG_LAYERS = "full_attention"
"""The layers that see the whole context, where a family has RoPE parameters by type of layer; the others see a window."""


@dataclass(frozen=True)
class Stretch:
    """How a model's context was stretched.

    Attributes:
        method: linear, dynamic or yarn.
        factor: new context over trained context, above 1.
        trained: trained context in tokens.
    """

    method: str
    factor: float
    trained: int

    @property
    def reach(self) -> int:
        """The new context in tokens."""
        return int(self.trained * self.factor)

    def __str__(self) -> str:
        return f"{self.method} x{self.factor:g}"


def stretch_positions(config: Any, context: ContextConfig, name: str) -> Stretch | None:
    """Set the RoPE parameters of a model config, in place, before the model is made from it.

    The trained base, the rotated share of each head and whatever else the family keeps there stay as they are. Where
    parameters differ by type of layer, those of the full-attention layers are set: sliding layers never look further than
    they were trained to.

    Args:
        config: the model's config, or one that holds it as its text config.
        context: method and factor.
        name: of the model, for messages.

    Returns:
        What was done; None when nothing was (no method, or factor 1).

    Raises:
        ModelError: no RoPE that can be scaled, a config that scales its own already, or no trained length.
    """
    if context.rope_scaling == "none" or context.rope_factor == 1.0:
        return None
    text = config.get_text_config()
    whole, parameters = _parameters(text, name)
    trained = getattr(text, "max_position_embeddings", None)
    if not trained:
        raise ModelError(f"{name}: its config has no max_position_embeddings, so its context cannot be extended")
    stretch = Stretch(context.rope_scaling, context.rope_factor, int(trained))
    scaled = {**parameters, **_scaling(stretch)}
    text.rope_parameters = {**whole, _LONG_LAYERS: scaled} if parameters is not whole else scaled
    if stretch.method != "dynamic":  # which takes this very value for the trained length
        text.max_position_embeddings = stretch.reach
    return stretch


def _parameters(text: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All RoPE parameters of a config, and those that are to be scaled (the same, or a part by type of layer)."""
    whole = getattr(text, "rope_parameters", None)
    if not whole or getattr(text, "alibi", False):
        raise ModelError(
            f"{name}: models of type {text.model_type} have no rotary positions (RoPE) that can be scaled; set "
            "backbone.context.rope_scaling = none"
        )
    # Parameters by layer type are nested dicts, or None for a type that has none.
    by_layer = any(value is None or isinstance(value, dict) for value in whole.values())
    parameters = whole.get(_LONG_LAYERS) if by_layer else whole
    if not parameters:
        raise ModelError(
            f"{name}: its RoPE parameters are per layer type ({', '.join(whole)}) with none for {_LONG_LAYERS}, which cannot "
            "be scaled; set backbone.context.rope_scaling = none"
        )
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        factor = parameters.get("factor")
        raise ModelError(
            f"{name}: its config already has RoPE scaling ({kind}{f' x{factor:g}' if factor else ''}, for "
            f"{getattr(text, 'max_position_embeddings', 'unknown')} tokens); set backbone.context.rope_scaling = none to use "
            "it as it is"
        )
    return whole, parameters


def _scaling(stretch: Stretch) -> dict[str, Any]:
    """The parameters that transformers wants for this method."""
    if stretch.method == "dynamic":
        # Transformers scales by factor * tokens / L - (factor - 1): 57 at 8 times the trained length with factor 8. Its
        # factor 1 is the tokens / L of the paper, which reads long text better (benchmarks/long_context.py measures both).
        return {"rope_type": "dynamic", "factor": 1.0}
    if stretch.method == "yarn":
        return {"rope_type": "yarn", "factor": stretch.factor, "original_max_position_embeddings": stretch.trained}
    return {"rope_type": "linear", "factor": stretch.factor}


def check_stretch(model: nn.Module, stretch: Stretch, name: str) -> str | None:
    """Make sure that a loaded model computes its positions this way.

    With `dynamic`, transformers keeps the angles of the longest pass so far, so that what a text is given would depend on what
    was read before it; here every pass starts from scratch.

    Returns:
        A sentence for the user about what the method cannot do, or None.

    Raises:
        ModelError: no part of the model follows its RoPE parameters.
    """
    found = [module for module in model.modules() if stretch.method in _methods(module)]
    if not found:
        kind = getattr(model.config, "model_type", "this")
        raise ModelError(
            f"{name}: models of type {kind} do not follow RoPE scaling in their config; set "
            "backbone.context.rope_scaling = none"
        )
    if stretch.method != "dynamic":
        return None
    for module in found:
        module.register_forward_pre_hook(_forget_longer_passes)
    return (
        f"dynamic RoPE scaling: beyond {stretch.trained} tokens, log-probs depend on the longest text of the batch, and "
        "log-probs during sampling differ from those of a full forward pass; use yarn or linear to train on such lengths"
    )


def _methods(module: nn.Module) -> list[str]:
    """RoPE methods that a rotary module follows, `[]` for other modules."""
    kind = getattr(module, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind] if isinstance(kind, str) else []


def _forget_longer_passes(module: Any, arguments: Any) -> None:
    for name, trained in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            # transformers resets itself like this only in a pass within the trained length. The prefix is the layer type.
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", trained)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
