"""A key-value cache whose room is taken once: new tokens are written in place instead of copied with all the old ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["RoomyLayer", "roomy_cache", "select_rows"]


class RoomyLayer(DynamicLayer):
    """A full-attention layer's cache with room for `room` more tokens than its first update brings."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new states behind the old ones and returns views of all of them, `[B, heads, T, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys = self._empty(key_states)
            self.values = self._empty(value_states)
        end = self.length + key_states.shape[-2]
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _empty(self, states: Tensor) -> Tensor:
        batch, heads, length, size = states.shape
        return states.new_empty(batch, heads, length + self.room, size)

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            rows = beam_idx.to(self.keys.device)  # each layer's cache lies where the layer is computed
            self.keys, self.values = self.keys[rows], self.values[rows]


def roomy_cache(config: Any, room: int) -> DynamicCache:
    """A cache for a model of this config; layers that keep everything get `room`, others stay as transformers made them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keeps (or repeats) these batch rows of the cache, in this order."""
    # Not `batch_select_indices`: layers with running states (Mamba) lack it, or have it for their keys and values alone.
    cache.reorder_cache(rows)
