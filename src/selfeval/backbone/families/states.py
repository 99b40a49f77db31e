"""How a family is handed its state while it writes: keys and values for attention, running states for state-space models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from selfeval.errors import ModelError

__all__ = ["check_state", "state_arguments"]

_OWN_STATE = frozenset({"minimax", "reformer", "rwkv", "xlnet", "xlstm"})
"""Types of model whose state is of a kind of its own, which rows cannot leave or join."""


def check_state(loaded: Any) -> None:
    """Refuses models that cannot write several replies at once here.

    Raises:
        ModelError: the model keeps its state in a way of its own.
    """
    kind = loaded.model.config.model_type
    has_cache = loaded.forward_accepts("past_key_values") or loaded.forward_accepts("cache_params")
    if kind in _OWN_STATE or not has_cache:
        raise ModelError(
            f"models of type {kind} keep the state of a half-written reply in a way this version cannot split into rows; "
            "use a model with a transformers cache (see docs/concepts/families.md)"
        )


def state_arguments(loaded: Any, cache: DynamicCache, attention_BT: Tensor, new: int) -> dict[str, Any]:
    """The arguments of a forward pass over `new` tokens that follow what is in the cache.

    Args:
        loaded: the model (`backbone.load.LoadedModel`).
        cache: what the model has read so far.
        attention_BT: 1 at real tokens, for those in the cache and the new ones; padding is on the left.
        new: tokens of this pass.
    """
    if loaded.forward_accepts("past_key_values"):
        return {"attention_mask": attention_BT, "past_key_values": cache}
    return {"attention_mask": attention_BT[:, -new:], "cache_params": cache}  # a running state has no past to mask
