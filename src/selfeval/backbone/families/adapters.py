"""Which modules get LoRA adapters when all linear layers are asked for, family by family.

PEFT's `all-linear` is right for most. It is not where
- experts are one fused parameter: PEFT would wrap the whole stack of them, which builds a full-size update of it in every pass
  and makes each role an adapter of experts x rank, and it would move the router's choices; experts and routers stay as they are
  unless they are asked for by name;
- a state-space mixer reads a projection's weight instead of calling the projection: an adapter there would never be used;
- the model has towers for pictures or sound, which no text passes through.
"""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from selfeval.config import nearest
from selfeval.errors import ConfigError

__all__ = ["ALL_LINEAR", "adapter_targets"]

ALL_LINEAR = "all-linear"
"""The value of `backbone.lora.targets` that leaves the choice to this module."""

_UNREACHED = {
    "mamba": ("out_proj", "dt_proj"),
    "falcon_mamba": ("out_proj", "dt_proj"),
    "mamba2": ("out_proj",),
    "falcon_h1": ("out_proj",),
    "nemotron_h": ("out_proj",),
    "jamba": ("dt_proj",),
}
"""model_type -> linear layers whose weight is read without the layer being called (by the mixer, or by its fused kernel)."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of a config that say how many experts there are."""

_ROUTERS = ("gate", "router")
"""Names of the router module in mixture-of-experts models."""


def adapter_targets(model: Any, wanted: str | tuple[str, ...], unread: tuple[str, ...] = ()) -> dict[str, Any]:
    """PEFT's `target_modules` and `exclude_modules` for this model.

    Args:
        model: a causal language model of transformers, with or without adapters.
        wanted: `all-linear`, one pattern of module names, or names of modules; the last two are passed on as they are.
        unread: paths of further layers that `all-linear` leaves out.

    Raises:
        ConfigError: a name is that of no module; PEFT would leave it out without a word.
    """
    if isinstance(wanted, tuple):
        _refuse_unknown(model, wanted)
        return {"target_modules": list(wanted)}
    if wanted != ALL_LINEAR:
        return {"target_modules": wanted}
    left_out = [rf"(.*\.)?{re.escape(name)}(\..*)?" for name in (*_left_out(model.config.get_text_config()), *unread)]
    decoder = _text_prefix(model)
    if decoder:
        # PEFT matches whole names: exclude everything outside the part that reads text.
        left_out.append(rf"(?!{re.escape(decoder)}\.).*")
    return {"target_modules": _without_experts(model), "exclude_modules": "|".join(left_out) or None}


def _refuse_unknown(model: Any, names: tuple[str, ...]) -> None:
    """Refuse names of no module; those of experts that transformers has fused since are known to PEFT's conversion."""
    modules = {name for name, _ in model.named_modules()}
    unknown = [name for name in names if not any(f".{module}".endswith(f".{name}") for module in modules)]
    if not unknown:
        return
    probe = PeftLoraConfig(task_type="CAUSAL_LM", target_modules=list(names))
    try:
        convert_peft_config_for_transformers(probe, model=model, conversions=None)
    except ValueError:
        return  # known names, though not to be had like this; PEFT says why when it makes the adapters
    left = probe.target_modules or ()
    for name in unknown:
        if name in left:
            layers = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            raise ConfigError(
                f'backbone.lora.targets: no module of this model is called "{name}"{nearest(name, sorted(layers))}'
            )


def _left_out(config: Any) -> tuple[str, ...]:
    routers = _ROUTERS if any(getattr(config, field, None) for field in _EXPERTS) else ()
    return (*_UNREACHED.get(str(config.model_type), ()), *routers)


def _without_experts(model: Any) -> str | list[str]:
    """`all-linear`, or the names that are left of it where PEFT would put adapters on fused experts."""
    probe = PeftLoraConfig(task_type="CAUSAL_LM", target_modules=ALL_LINEAR)
    convert_peft_config_for_transformers(probe, model=model, conversions=None)
    return sorted(probe.target_modules) if probe.target_parameters else ALL_LINEAR


def _text_prefix(model: Any) -> str | None:
    """Name of the part that reads text, in a model that has other parts too."""
    if model.config.get_text_config() is model.config:
        return None
    decoder: nn.Module = model.get_decoder()
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[decoder]
