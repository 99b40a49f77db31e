"""Weight files with more rows: copied byte by byte, with one block of rows in memory at a time.

A file may be larger than the memory, so it is never loaded as a whole. The format is documented at
https://huggingface.co/docs/safetensors: the length of the header in 8 bytes, the header as JSON, then the data.

Shapes: V rows, D numbers of a row, B bytes of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfeval.backbone.weight_headers import TensorHeader

__all__ = ["DTYPES", "Growth", "grow_file"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of plain numbers by their names in a file. Others are packed or quantised."""

_BLOCK = 1 << 24
"""Bytes that are read at a time."""
_ALIGNED = 8


@dataclass(frozen=True)
class Growth:
    """How the rows of a tensor change: from `before` to `after`, with new ones from `first` on, one for each of `pieces`."""

    before: int
    after: int
    first: int
    pieces: Sequence[tuple[int, ...]]

    def rows(self, old_VB: NDArray[np.uint8], dtype: torch.dtype) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of the new tensor in blocks of rows.

        Rows beyond those of the tokens, such as the padding of the new size, are the mean of the rows of the old tokens.

        Args:
            old_VB: bytes of the old rows.
            dtype: type of their numbers.
        """
        used, stop = min(self.first, self.before), self.first + len(self.pieces)
        mean_B = _bytes(_mean(old_VB[:used], dtype), dtype)
        yield from _blocks(old_VB[:used])
        yield np.tile(mean_B, (self.first - used, 1))
        for pieces in self.pieces:
            yield _bytes(_numbers(old_VB[list(pieces)], dtype).float().mean(0, keepdim=True), dtype)
        yield from _blocks(old_VB[stop:])
        yield np.tile(mean_B, (self.after - max(stop, self.before), 1))


def grow_file(
    source: Path,
    target: Path,
    headers: Mapping[str, TensorHeader],
    metadata: Mapping[str, str] | None,
    grown: Collection[str],
    growth: Growth,
) -> int:
    """Copy a safetensors file, with more rows in some tensors.

    Args:
        source: the file.
        target: path of the copy.
        headers: the tensors of the file.
        metadata: Optional. Its metadata.
        grown: names of the tensors that grow; of a type in `DTYPES`, with `growth.before` rows.
        growth: how they grow.

    Returns:
        The number of bytes by which the tensors grew.
    """
    # In the order of the library, which aligns each tensor: the widest numbers first, then by name.
    order = sorted(headers, key=lambda name: (-_width(headers[name]), name))
    sizes = {name: (headers[name].stop - headers[name].start) for name in order}
    shapes = {name: list(headers[name].shape) for name in order}
    for name in grown:
        sizes[name] = sizes[name] // growth.before * growth.after
        shapes[name][0] = growth.after
    with source.open("rb") as old, target.open("wb") as new:
        new.write(_header({name: headers[name].dtype for name in order}, shapes, sizes, metadata))
        for name in order:
            header = headers[name]
            if name in grown:
                for block in growth.rows(_mapped(source, header), DTYPES[header.dtype]):
                    new.write(block.tobytes())
            else:
                _copy(old, new, header.start, header.stop)
    return sum(sizes.values()) - sum(header.stop - header.start for header in headers.values())


def _header(
    dtypes: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str] | None,
) -> bytes:
    values: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name, size in sizes.items():
        values[name] = {"dtype": dtypes[name], "shape": list(shapes[name]), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _copy(old: BinaryIO, new: BinaryIO, start: int, stop: int) -> None:
    old.seek(start)
    while start < stop:
        block = old.read(min(_BLOCK, stop - start))
        if not block:
            raise OSError(f"{old.name} became shorter while it was read")
        new.write(block)
        start += len(block)


def _mapped(source: Path, header: TensorHeader) -> NDArray[np.uint8]:
    """Return the bytes of each row, mapped: only the rows that are read are in memory."""
    shape = (header.shape[0], (header.stop - header.start) // header.shape[0])
    return np.memmap(source, dtype=np.uint8, mode="r", offset=header.start, shape=shape)


def _blocks(rows_VB: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    size = max(1, _BLOCK // max(1, rows_VB.shape[1]))
    for start in range(0, len(rows_VB), size):
        yield np.asarray(rows_VB[start : start + size])


def _mean(rows_VB: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """Return the mean of the rows, `[1, D]`."""
    total = torch.zeros(1, rows_VB.shape[1] // dtype.itemsize, dtype=torch.float64)
    for block in _blocks(rows_VB):
        total += _numbers(block, dtype).double().sum(0, keepdim=True)
    return total / max(1, len(rows_VB))


def _numbers(rows_VB: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(rows_VB)).view(dtype)


def _bytes(rows_VD: Tensor, dtype: torch.dtype) -> NDArray[np.uint8]:
    return np.asarray(rows_VD.to(dtype).contiguous().view(torch.uint8).numpy())


def _width(header: TensorHeader) -> int:
    """Return the bits of a number."""
    return 8 * (header.stop - header.start) // max(1, math.prod(header.shape))
