"""Headers of a model's safetensors files: names, shapes and byte ranges of its tensors, and whether the files are complete.

This module does not import torch, so facts about a model are known before it is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.errors import ModelError
from selfeval.links import stays_inside

__all__ = [
    "INDEX",
    "SINGLE",
    "TensorHeader",
    "check_pointers",
    "count_parameters",
    "is_lfs_pointer",
    "read_headers",
    "shards_of",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the weight file of a model, and of the index of one that is split."""
_LFS = b"version https://git-lfs"
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of each safetensors dtype."""


@dataclass(frozen=True)
class TensorHeader:
    """Location, dtype and shape of a tensor in a safetensors file.

    Attributes:
        file: path of the file.
        dtype: dtype name used in the file, for example BF16.
        shape: tensor shape.
        start, stop: byte range, counted from the start of the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def shards_of(index: Path) -> list[str]:
    """Return the files listed in an index, sorted."""
    if is_lfs_pointer(index):
        raise ModelError(_lfs_message([index]))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{index} is not an index of weight files (an object with a weight_map): {error!r}; download it again"
        ) from error
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} lists no weight files in its weight_map; download it again")
    if outside := next((name for name in sorted(names) if not stays_inside(name)), None):
        raise ModelError(f"{index} lists {outside!r}, which is not a file in the model folder; download it again")
    return sorted(names)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a git-lfs pointer instead of the actual content."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _lfs_message(files: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in files[:3]) + (" and others" if len(files) > 3 else "")
    return (
        f"{files[0].parent}: {names} {'is' if len(files) == 1 else 'are'} a git-lfs pointer, not the file itself; "
        "run `git lfs pull` in this folder"
    )


def check_pointers(folder: Path) -> None:
    """Reject a folder that was cloned without git-lfs.

    Raises:
        ModelError: some of its files are pointers.
    """
    pointers = [path for path in sorted(folder.iterdir()) if path.is_file() and is_lfs_pointer(path)]
    if pointers:
        raise ModelError(_lfs_message(pointers))


_LONGEST_HEADER = 100_000_000
"""Limit of the safetensors library."""


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """Read name, dtype, shape and byte range of every tensor in these files.

    Raises:
        ModelError: a file is a git-lfs pointer, truncated, or not a safetensors file.
    """
    return {name: header for path in files for name, header in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, TensorHeader]:
    size = path.stat().st_size
    with path.open("rb") as file:
        # A safetensors file: the header's length in 8 bytes, the header as JSON, and the data, from whose start offsets count.
        first = file.read(8)
        if _LFS.startswith(first) and len(first) == 8:
            raise ModelError(_lfs_message([path]))
        length = int.from_bytes(first, "little")
        if size < 8 or length > size - 8:
            raise ModelError(_cut_off(path, "its header extends past the end of the file"))
        if length > _LONGEST_HEADER:
            raise ModelError(
                _cut_off(path, f"its header has {length:,} bytes, more than {_LONGEST_HEADER:,}, the format's limit")
            )
        text = file.read(length)
    try:
        entries = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        found = {name: _tensor(path, value, 8 + length) for name, value in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file (its header is damaged: {error!r}); download it again") from error
    end = max((tensor.stop for tensor in found.values()), default=8 + length)
    if end > size:
        raise ModelError(_cut_off(path, f"it has {size:,} bytes, but its header describes {end:,}"))
    if end < size:
        raise ModelError(f"{path} is damaged: {size - end:,} of its {size:,} bytes belong to no tensor; download it again")
    return found


def _cut_off(path: Path, why: str) -> str:
    return f"{path} is truncated or not a safetensors file: {why}; download or copy it again"


def _tensor(path: Path, entry: Mapping[str, Any], base: int) -> TensorHeader:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    bits = _BITS.get(dtype)
    if not 0 <= start <= stop or min(shape, default=0) < 0:
        raise ValueError(f"data_offsets {start}, {stop} of shape {list(shape)}")
    if bits is not None and (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{stop - start} bytes for shape {list(shape)} of {dtype}")
    return TensorHeader(path, dtype, shape, base + start, base + stop)


def count_parameters(folder: Path) -> int:
    """Count the elements of all tensors in a model folder's weight files; weights that share a tensor count once.

    Raises:
        ModelError: it has no safetensors files, or one is damaged.
        OSError: a file cannot be read.
    """
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else [folder / name for name in shards_of(folder / INDEX)]
    return sum(math.prod(header.shape) for header in read_headers(files).values())
