"""One pass over all bytes of the weight files: the hash of every tensor, and whether its numbers are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path

import torch

from selfeval.backbone.weight_headers import TensorHeader, read_headers
from selfeval.errors import ModelError

__all__ = ["TensorDigest", "check_finite", "tensor_digests"]

_CHUNK = 1 << 20
"""Bytes read at a time: they stay in the processor's cache, and are a multiple of every type's size."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorDigest:
    """Content of a tensor in a file.

    Attributes:
        dtype: name of its type in the file, for example BF16.
        hash: SHA-256 of its bytes, as hex.
        is_finite: no number of it is NaN or infinite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    hash: str
    is_finite: bool


def tensor_digests(files: Sequence[Path]) -> list[TensorDigest]:
    """Every tensor of these files, by name.

    The result is kept for this process by path, size and time of the last change.

    Raises:
        ModelError: a file is no whole safetensors file.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter's lock
        found = [digest for digests in pool.map(_of_file, files) for digest in digests]
    return sorted(found, key=lambda digest: digest.name)


def check_finite(files: Sequence[Path], name: str) -> None:
    """Refuse NaN or infinite weights, because all outputs of such a model would be NaN.

    Raises:
        ModelError: some are NaN or infinite.
    """
    wrong = [digest.name for digest in tensor_digests(files) if not digest.is_finite]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"{name}: {wrong[0]}{others} in the weight files contain NaN or infinite values; download the files again, or use "
            "a model whose training did not diverge"
        )


def _of_file(path: Path) -> tuple[TensorDigest, ...]:
    # Size and time are arguments of the cached function, so a file that changed is read again.
    status = path.stat()
    return _digests(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digests(path: Path, size: int, changed: int) -> tuple[TensorDigest, ...]:
    # In the order of the file, which is then read sequentially.
    headers = sorted(read_headers((path,)).items(), key=lambda item: item[1].start)
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        return tuple(_digest(file, name, header, buffer) for name, header in headers)


def _digest(file: FileIO, name: str, header: TensorHeader, buffer: memoryview) -> TensorDigest:
    found, finite, left = hashlib.sha256(), True, header.stop - header.start
    file.seek(header.start)
    while left:
        chunk = buffer[: min(left, _CHUNK)]
        _fill(file, chunk, header.file)
        found.update(chunk)
        finite = finite and _is_finite(chunk, header.dtype)
        left -= len(chunk)
    return TensorDigest(name, header.dtype, header.shape, found.hexdigest(), finite)


def _fill(file: FileIO, chunk: memoryview, path: Path) -> None:
    filled = 0
    while filled < len(chunk):
        # An unbuffered read may return fewer bytes than requested.
        read = file.readinto(chunk[filled:])
        if not read:
            raise ModelError(f"{path} ended unexpectedly while it was read; download or copy it again")
        filled += read


def _is_finite(chunk: memoryview, dtype: str) -> bool:
    """By the sum, which takes a fifteenth of the time of `isfinite`; only a sum that overflows needs a closer look."""
    if dtype not in _FLOATS:
        return True
    numbers = torch.frombuffer(chunk, dtype=_FLOATS[dtype])
    total = numbers.sum(dtype=torch.float64 if dtype == "F64" else torch.float32)
    return bool(total.isfinite()) or bool(numbers.isfinite().all())
