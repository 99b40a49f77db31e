"""A backbone for which there is too little memory: passes above a size fail in the middle, with torch's own error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selfeval.backbone.families.cache import CACHE_FIELD
from selfeval.backbone.roles import Backbone

__all__ = ["no_memory"]


@contextmanager
def no_memory(
    backbone: Backbone, *, tokens: int = 10**9, rows: int = 10**9, written: int = 0, backward: bool = False
) -> Iterator[list[tuple[int, int]]]:
    """Passes of more than `tokens` tokens (padding counted) or `rows` rows run out of memory in their last layer.

    With `written`, only where the cache holds more than so many tokens of each row: a batch that grew too large while it was
    written. With `backward`, the pass goes through, and its backward fails in its first layer, when the gradients of the
    layers above are there.

    Yields:
        Rows and tokens of each pass that failed.
    """
    failed: list[tuple[int, int]] = []
    layer: nn.Module = backbone.model.base_model.layers[0 if backward else -1]

    def fail(shape: tuple[int, int]) -> None:
        failed.append(shape)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def look(module: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        batch, length = int(hidden.shape[0]), int(hidden.shape[1])
        cache = options.get(CACHE_FIELD)
        if (batch <= rows and batch * length <= tokens) or (
            written and cache is not None and cache.get_seq_length() <= written
        ):
            return
        if not backward:
            fail((batch, length))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: fail((batch, length)))

    handle = layer.register_forward_hook(look, with_kwargs=True)
    try:
        yield failed
    finally:
        handle.remove()
