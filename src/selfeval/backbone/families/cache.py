"""The only module that touches transformers' caches: their classes, their layers, and the names under which models take them.

All of it is private or recent in transformers and has changed between minor releases:

- 5.24 renamed `past_key_values`, and `cache_params` of state-space models, to `cache`, in arguments and in outputs;
- models whose code comes with their weights keep the name that they were written with, whatever release is installed.

A release that changes more is met here, and tests/backbone/families/test_cache.py runs at both ends of the declared range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from selfeval.errors import ModelError

__all__ = [
    "CACHE_FIELD",
    "PreallocatedLayer",
    "RowFacts",
    "append_rows",
    "appends_rows",
    "cache_argument",
    "cache_bytes",
    "cache_of",
    "check_state",
    "drop_last",
    "empty_cache",
    "has_running_state",
    "is_cache",
    "preallocated_cache",
    "resize_columns",
    "select_rows",
    "state_arguments",
]

CACHE_FIELD = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in ("cache", "past_key_values"))
"""The field of a model's output that holds the cache, and the argument that transformers' `generate` passes it in."""

_ARGUMENTS = ("cache", "past_key_values", "cache_params")

_OWN_STATE = frozenset({"minimax", "reformer", "rwkv", "xlnet", "xlstm"})
"""Model types with a custom state that does not support adding or removing rows."""


# -- the names of a model's cache ---------------------------------------------------------------------------------------


def cache_argument(loaded: Any) -> str | None:
    """The argument in which this model's forward pass takes its cache, or None if it takes none.

    Args:
        loaded: the model (`backbone.load.LoadedModel`).
    """
    return next((name for name in _ARGUMENTS if loaded.forward_accepts(name)), None)


def cache_of(output: Any) -> Any:
    """The cache in the output of a forward pass of a model of transformers, or None."""
    return getattr(output, CACHE_FIELD)


def check_state(loaded: Any) -> None:
    """Refuse models that cannot write several replies at once here.

    Raises:
        ModelError: the model uses a custom state.
    """
    kind = loaded.model.config.model_type
    if kind in _OWN_STATE or cache_argument(loaded) is None:
        raise ModelError(
            f"models of type {kind} store the state of a partial reply in a form that this version cannot split into rows; "
            "use a model with a transformers cache (see docs/concepts/families.md)"
        )


def state_arguments(loaded: Any, cache: Any, attention_BT: Tensor, new: int) -> dict[str, Any]:
    """Return the arguments of a forward pass over `new` tokens that follow those in the cache.

    Args:
        loaded: the model (`backbone.load.LoadedModel`).
        cache: of the tokens that the model has read so far.
        attention_BT: 1 at real tokens, for those in the cache and the new ones; padding is on the left.
        new: tokens of this pass.
    """
    name = cache_argument(loaded)
    assert name is not None, "check_state refuses such a model"
    if name == "cache_params" or not _attends(cache):
        attention_BT = attention_BT[:, -new:]  # a running state has no past to mask
    return {"attention_mask": attention_BT, name: cache}


def _attends(cache: Any) -> bool:
    """Whether some layer keeps keys and values; a cache without layers makes those of attention when it is first written to."""
    return not cache.layers or any(hasattr(layer, "keys") for layer in cache.layers)


def is_cache(value: Any) -> bool:
    """Whether an argument of a layer is a cache, which a pass writes to."""
    return isinstance(value, Cache)


# -- caches ---------------------------------------------------------------------------------------------------------------


class PreallocatedLayer(DynamicLayer):
    """A full-attention layer's cache whose memory is allocated once: new tokens and new rows are written in place.

    transformers' own layer concatenates, which copies all old tokens for every new one.

    Rows share their columns: column `first + length - 1` holds the last token of every row, and shorter rows have padding on
    their left. Without `rows`, the first update determines the number of rows; with it, rows are added by `append`.

    Args:
        room: tokens that it can hold in addition to those of its first update, or to `width`.
        rows: Optional. Maximum number of rows that `append` adds.
        width: with `rows`: number of columns of the longest prompt.

    Attributes:
        length: number of columns in use.
        first: the first of them.
    """

    def __init__(self, room: int, rows: int | None = None, width: int = 0) -> None:
        super().__init__()
        self.room, self.rows = room, rows
        self.first, self.length = 0, 0 if rows is None else width
        self._columns = self.length + room
        self._whole: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states behind the old ones and return views of all of them, `[B, heads, T, D]`."""
        if not self.is_initialized:
            self._allocate(key_states, value_states, len(key_states), key_states.shape[-2] + self.room)
        new = key_states.shape[-2]
        self._make_room(new)
        start, end = self.first + self.length, self.first + self.length + new
        for states, more in zip(self._states(), (key_states, value_states), strict=True):
            states[:, :, start:end] = more
        self.length += new
        keys, values = self._states()
        return keys[:, :, self.first : end], values[:, :, self.first : end]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows of whole prompts `[N, heads, P, D]`, right-aligned to the rows that are there."""
        if self._whole is None:
            assert self.rows is not None
            self._allocate(keys, values, self.rows, self._columns)
            self._take(0)
        assert self._whole is not None
        before, end = len(self._states()[0]), self.first + self.length
        for whole, states in zip(self._whole, (keys, values), strict=True):
            new = whole[before : before + len(states)]
            new[:, :, end - states.shape[-2] : end] = states
            # Masked, but attention multiplies it by zero: uninitialised memory may hold NaN.
            new[:, :, self.first : end - states.shape[-2]] = 0
        self._take(before + len(keys))

    def resize(self, columns: int) -> None:
        """Have this many columns: drop the first ones, which are padding in every row, or add padding in front."""
        if not self.is_initialized or not len(self._states()[0]):
            self.first, self.length = 0, columns
            return
        more = columns - self.length
        if more > self.first:
            self._shift(more - self.first)
        self.first, self.length = self.first - more, columns
        for states in self._states():
            # As in `append`; an earlier row may also have left NaN there.
            states[:, :, self.first : self.first + max(0, more)] = 0

    def release(self) -> None:
        """Free the memory."""
        self._whole = None
        self.is_initialized = False
        del self.keys, self.values

    def _make_room(self, new: int) -> None:
        """Move the columns to the front if there is no room for new ones behind them."""
        if not self.first or self.first + self.length + new <= self._states()[0].shape[-2]:
            return
        for states in self._states():
            # In steps of `first` columns, so that source and target of a copy do not overlap.
            for start in range(0, self.length, self.first):
                stop = min(start + self.first, self.length)
                states[:, :, start:stop] = states[:, :, self.first + start : self.first + stop]
        self.first = 0

    def _shift(self, columns: int) -> None:
        """Move the columns in use behind this many others."""
        end = self.first + self.length
        for states in self._states():
            # A copy, because source and target overlap.
            states[:, :, self.first + columns : end + columns] = states[:, :, self.first : end].clone()
        self.first += columns

    def _allocate(self, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        self.lazy_initialization(keys, values)
        self._whole = self._empty(keys, rows, columns), self._empty(values, rows, columns)
        self._take(rows)

    def _empty(self, states: Tensor, rows: int, columns: int) -> Tensor:
        _, heads, _, size = states.shape
        return states.new_empty(rows, heads, columns, size)

    def _take(self, rows: int) -> None:
        """Let this many of the allocated rows be in use."""
        assert self._whole is not None
        self.keys, self.values = (states[:rows] for states in self._whole)

    def _states(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        # A layer that is never written to, as for cross-attention to images, has no tokens even where others have.
        return self.length if self.is_initialized else 0

    def move_rows(self, to: Tensor, source: Tensor, count: int) -> None:
        """Move rows in place and keep the first `count`: only the moved rows are copied, and only what is written of them."""
        if not self.is_initialized:
            return
        columns = slice(self.first, self.first + self.length)
        for states in self._states():
            if len(to):
                # Each layer's cache is on the device that computes the layer.
                states[to.to(states.device), :, columns] = states[source.to(states.device), :, columns]
        self._take(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            keys, values = (states[beam_idx.to(states.device)] for states in self._states())
            self._whole = keys, values
            self._take(len(keys))


class RowFacts(DynamicLayer):
    """Numbers that a cache remembers of each of its rows.

    They are stored behind the cache's real layers as one more "token" `[B, 1, 1, N]`, so that whoever selects, repeats or
    reorders the rows of the cache does so to these as well.
    """

    def __init__(self, facts_BN: Tensor) -> None:
        super().__init__()
        # A layer of a cache has keys and values; both hold the facts, and only the keys are read.
        self.update(facts_BN[:, None, None], facts_BN[:, None, None])

    @property
    def facts_BN(self) -> Tensor:
        assert self.keys is not None
        facts_BN: Tensor = self.keys[:, 0, -1]
        return facts_BN

    @classmethod
    def of(cls, cache: Any) -> Self | None:
        """Return the facts in this cache, or None where it has none of this class."""
        return next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, cls)), None)

    def put_in(self, cache: Any) -> None:
        """Add these facts to the cache in place of earlier ones."""
        cache.layers = [*(layer for layer in cache.layers if not isinstance(layer, type(self))), self]


def has_running_state(config: Any) -> bool:
    """Return whether some layer of a model of this config keeps a state instead of keys and values, as in Mamba."""
    return any(
        not isinstance(layer, DynamicLayer) or hasattr(layer, "recurrent_states") for layer in empty_cache(config).layers
    )


def empty_cache(config: Any) -> DynamicCache:
    """Return a cache that grows by copying, as transformers makes one for a model of this config."""
    return DynamicCache(config=config)


def preallocated_cache(config: Any, room: int, rows: int | None = None, width: int = 0) -> DynamicCache:
    """Return a cache for a model of this config; layers that keep everything get `room`, others are those of transformers.

    Args:
        config: of the model.
        room, rows, width: as in `PreallocatedLayer`.
    """
    cache = DynamicCache(config=config)
    # Exactly DynamicLayer, because its subclasses have a sliding window or further state.
    cache.layers = [PreallocatedLayer(room, rows, width) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def appends_rows(loaded: Any) -> bool:
    """Return whether new rows can join the cache of a batch: all of its layers keep everything, and nothing else per row.

    Args:
        loaded: the model (`backbone.load.LoadedModel`).
    """
    layers = empty_cache(loaded.model.config).layers
    return (
        bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
        and not getattr(loaded.model, "keeps_row_facts", False)
    )


def append_rows(cache: DynamicCache, prompts: DynamicCache, owners: Sequence[int], device: Any) -> None:
    """Add rows to a cache with `rows`, each with the prompt of a row of another cache.

    Args:
        cache: the cache that rows are added to.
        prompts: cache after the prompts; its layers are released one by one, so that both never hold everything.
        owners: for each new row, the row of its prompt.
        device: device of the index.
    """
    index = torch.tensor(owners, device=device)
    for layer, source in zip(_preallocated(cache), _preallocated(prompts), strict=True):
        if not source.is_initialized:
            continue  # the layer computes nothing: cross-attention to images, without images
        keys, values = (states[:, :, : source.length] for states in source._states())
        rows = index.to(keys.device)
        layer.append(keys[rows], values[rows])
        del keys, values
        source.release()


def resize_columns(cache: DynamicCache, columns: int) -> None:
    """Drop columns at the front that are padding in every row, or add such columns.

    Args:
        cache: a cache with `rows`.
        columns: their number afterwards, at most `width` and `room` together.
    """
    for layer in _preallocated(cache):
        layer.resize(columns)


def drop_last(cache: DynamicCache, columns: int) -> None:
    """Drop the last columns; later tokens are written over them.

    Args:
        cache: a cache with `rows`.
        columns: number of columns, fewer than there are.
    """
    for layer in _preallocated(cache):
        # A layer that is never written to has none.
        layer.length -= columns if layer.is_initialized else 0


def cache_bytes(cache: Any) -> int:
    """Return the bytes that are allocated for a cache, in use or not."""
    tensors = [tensor for layer in cache.layers for tensor in _tensors(list(vars(layer).values()))]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _preallocated(cache: DynamicCache) -> Iterator[PreallocatedLayer]:
    for layer in cache.layers:
        assert isinstance(layer, PreallocatedLayer), "appends_rows refuses such a cache"
        yield layer


def select_rows(cache: DynamicCache, rows: Sequence[int], device: Any) -> None:
    """Keep (or repeat) these batch rows of the cache, in this order.

    If the rows that change their place come from behind the last one that is kept, preallocated layers move them in place.

    Args:
        cache: the cache.
        rows: index of each row to keep.
        device: device of the index.
    """
    moved = [(to, row) for to, row in enumerate(rows) if to != row]
    in_place = all(row >= len(rows) for _, row in moved)
    to, source = (torch.tensor([pair[side] for pair in moved], dtype=torch.long, device=device) for side in (0, 1))
    index = torch.tensor(rows, device=device)
    for layer in cache.layers:
        if in_place and isinstance(layer, PreallocatedLayer):
            layer.move_rows(to, source, len(rows))
        else:
            # Not `batch_select_indices`: layers with running states (Mamba) lack it, or have it for keys and values alone.
            layer.reorder_cache(index)
