"""Count the weights in memory: those of the base, those of the roles, and the copies of the base."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from selfeval.backbone.role_set import RoleSet
from selfeval.backbone.streaming import held_weights, weight_bytes

__all__ = ["WeightCensus"]

_PACKED = (torch.int8, torch.uint8)
"""Storage dtypes of quantised weights."""


class WeightCensus:
    """Counts the weights of a model and of the roles on it.

    Args:
        model: the base, before any adapter is injected.
        roles: the roles on it.

    Attributes:
        base_bytes: bytes of the base weights on all devices, including disk.
    """

    def __init__(self, model: nn.Module, roles: RoleSet) -> None:
        self._model, self._roles = model, roles
        self.base_bytes = weight_bytes(model)
        self._base_shapes = {tuple(p.shape) for p in model.parameters() if p.ndim > 1}

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all adapters and heads."""
        return sum(p.numel() * p.element_size() for p in self._own())

    @property
    def parameter_count(self) -> int:
        """Number of parameters of the base."""
        return sum(p.numel() for n, p in self._model.named_parameters() if "lora_" not in n)

    def weight_copies(self) -> float:
        """Return how many copies of the base weights are in memory, to two decimals; must be 1 (weights on disk do not count).

        The count covers every live matrix (parameter or plain tensor) with the shape of a base weight, in any model and
        any precision, by distinct storage. Adapters and heads are excluded.
        """
        gc.collect()  # do not count garbage that was not collected yet
        own = {id(p) for p in self._own()}
        # type() instead of isinstance(): lazy modules among the objects warn or import when their __class__ is read.
        live = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and id(o) not in own]
        weights = [p for p in held_weights(self._model) if tuple(p.shape) in self._base_shapes and id(p) not in own]
        return round(_elements(t for t in live if tuple(t.shape) in self._base_shapes) / _elements(weights), 2)

    def _own(self) -> list[nn.Parameter]:
        """Return the weights of all roles."""
        return [p for role in self._roles.names for p in self._roles.parameters(role).values()]


def _elements(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements in these tensors, counting shared storage once."""
    real = [t for t in tensors if t.device.type != "meta" and (t.is_floating_point() or t.dtype in _PACKED)]
    return sum({(t.untyped_storage().data_ptr(), int(t.storage_offset())): t.numel() for t in real}.values())
