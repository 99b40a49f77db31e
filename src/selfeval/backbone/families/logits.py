"""Family-specific post-processing of logits, which is not part of any module.

`logits = cap * tanh(scale * head(hidden) / cap)`; most families have scale 1 and no cap. A model that does anything else is
refused when it is loaded (`Backbone` compares its own logits with the model's).
"""

from __future__ import annotations

from typing import Any

__all__ = ["logit_cap", "logit_scale"]

_TIMES = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
"""model_type -> field of the config that the logits are multiplied by."""

_OVER = {
    "granite": "logits_scaling",
    "granite_swa": "logits_scaling",
    "granitemoe": "logits_scaling",
    "granitemoe_swa": "logits_scaling",
    "granitemoehybrid": "logits_scaling",
    "granitemoeshared": "logits_scaling",
    "minicpm3": "logits_scaling",
}
"""model_type -> field of the config that the logits are divided by."""


def logit_scale(config: Any) -> float:
    """Return the factor applied to the logits, from the model's config (of the text part, where it has several)."""
    text = config.get_text_config()
    kind = str(text.model_type)
    if kind in _TIMES:
        return float(getattr(text, _TIMES[kind]))
    return 1.0 / float(getattr(text, _OVER[kind])) if kind in _OVER else 1.0


def logit_cap(config: Any) -> float | None:
    """The bound of logits that a tanh keeps inside of it (Gemma 2, https://arxiv.org/abs/2408.00118, section 2), or None."""
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    return None if cap is None else float(cap)
