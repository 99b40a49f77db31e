"""Files of vectors by the hash of their text: safetensors, read through a memory map, with a hash of their content.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.embeddings.protocol import Vectors
from selfeval.store import writing

__all__ = ["VectorFile", "open_vectors", "write_vectors"]

_KEY_BYTES = 32
_LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class VectorFile:
    """The content of a file.

    Attributes:
        keys: `text_digest` of each text. The whole hash: a collision would be a wrong vector.
        vectors_ND: their vectors, a memory map; rows are read from the disk when they are used.
    """

    keys: tuple[bytes, ...]
    vectors_ND: Vectors


def write_vectors(path: Path, embedder: str, keys: Sequence[bytes], vectors_ND: Vectors) -> None:
    """Write vectors and their keys in one step.

    Args:
        path: the file.
        embedder: name of the embedder.
        keys: N keys.
        vectors_ND: their vectors.

    Raises:
        StorageError: the file cannot be written.
    """
    from safetensors.numpy import save_file

    keys_NB = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), _KEY_BYTES)
    values_ND = np.ascontiguousarray(vectors_ND, np.float32)
    facts = {"embedder": embedder, "hash": _digest(keys_NB, values_ND)}
    with writing(path) as temporary:
        save_file({"keys": keys_NB, "vectors": values_ND}, temporary, facts)


def open_vectors(path: Path, embedder: str) -> VectorFile:
    """Open a file; its content is read once, to compare it with its hash.

    Args:
        path: the file.
        embedder: name of the embedder that the vectors must be from.

    Raises:
        ValueError: the file is truncated, damaged, or of another embedder.
        OSError: the file cannot be read.
    """
    header, start = _header(path)
    keys_NB = _mapped(path, header, start, "keys", np.uint8)
    vectors_ND = _mapped(path, header, start, "vectors", np.float32)
    facts = header.get("__metadata__") or {}
    if facts.get("embedder") != embedder:
        raise ValueError(f"it has vectors of {facts.get('embedder')}")
    if keys_NB.shape[1:] != (_KEY_BYTES,) or vectors_ND.ndim != 2 or len(keys_NB) != len(vectors_ND):
        raise ValueError(f"it has keys of shape {keys_NB.shape} and vectors of shape {vectors_ND.shape}")
    if facts.get("hash") != _digest(keys_NB, vectors_ND):
        raise ValueError("its content does not match its hash")
    return VectorFile(tuple(row.tobytes() for row in keys_NB), vectors_ND)


def _digest(keys_NB: NDArray[np.uint8], vectors_ND: Vectors) -> str:
    found = hashlib.sha256(np.ascontiguousarray(keys_NB).data)
    found.update(np.ascontiguousarray(vectors_ND).data)
    return found.hexdigest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its data begin.

    The library copies whole tensors into memory; a map of NumPy reads only the rows that are used.
    """
    with path.open("rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 0 < length <= _LARGEST_HEADER:
            raise ValueError("it has no header")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__") or {}, dict):
        raise ValueError("its header is not an object")
    return header, 8 + length


def _mapped(path: Path, header: dict[str, Any], start: int, name: str, kind: type[Any]) -> NDArray[Any]:
    try:
        shape = tuple(int(size) for size in header[name]["shape"])
        begin, end = (int(place) for place in header[name]["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it has no tensor {name}") from error
    if (
        begin < 0
        or min(shape, default=0) < 0
        or end - begin != int(np.prod(shape)) * np.dtype(kind).itemsize
        or path.stat().st_size < start + end
    ):
        raise ValueError("it is truncated")
    if end == begin:
        return np.zeros(shape, kind)
    return np.memmap(path, kind, mode="r", offset=start + begin, shape=shape)
