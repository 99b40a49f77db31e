"""A disk that becomes full in the middle of a run, inside this process and without a mount."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

__all__ = ["FullDisk"]

_OPEN, _MKDIR, _SERIALIZE = builtins.open, os.mkdir, safetensors.torch.serialize_file


class FullDisk:
    """The disk below a folder: it becomes full at the first write of each kind of file, and stays full until `free`.

    A write that does not fit leaves half of its bytes, as on a real disk. Files whose names differ only in numbers, such as
    those of shards, are of one kind.

    Attributes:
        refused: path of the write that did not fit since the last `free`; None if there was none.
        kinds: operation and path of every kind that was refused; with None, the disk becomes full by `fill` only.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = os.path.abspath(root)
        self.refused: str | None = None
        self.kinds: set[tuple[str, str]] | None = set()
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self._open)
        monkeypatch.setattr(os, "mkdir", self._mkdir)
        monkeypatch.setattr(safetensors.torch, "serialize_file", self._serialize)

    def fill(self) -> None:
        """Leave no room for any write."""
        self.refused = self.root

    def free(self) -> None:
        """Make room for the writes that were refused so far."""
        self.refused = None

    def has_no_room(self, operation: str, path: str) -> bool:
        """Return whether a write is refused."""
        if not path.startswith(self.root):
            return False
        kind = operation, re.sub(r"\d+", "N", path)
        if self.refused is None and self.kinds is not None and kind not in self.kinds:
            self.kinds.add(kind)
            self.refused = path
        return self.refused is not None

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        path = os.path.abspath(os.fsdecode(file)) if isinstance(file, str | bytes | os.PathLike) else ""
        if not set(mode) & set("wax+") or not path.startswith(self.root):
            return _OPEN(file, mode, buffering, *arguments, **options)
        if self.has_no_room("open", path):
            raise _no_space(path)
        raw = _File(self, path, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *arguments, **options)

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        if not os.path.exists(path) and self.has_no_room("mkdir", os.path.abspath(path)):
            raise _no_space(path)
        _MKDIR(path, *arguments, **options)

    def _serialize(self, tensors: Any, path: Any, **options: Any) -> None:
        _SERIALIZE(tensors, path, **options)
        if self.has_no_room("serialize", os.path.abspath(path)):
            os.truncate(path, os.path.getsize(path) // 2)
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class _File(io.FileIO):
    def __init__(self, disk: FullDisk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data: Any) -> int:
        if self._disk.has_no_room("write", self._path):
            super().write(bytes(data)[: len(data) // 2])
            raise _no_space(self._path)
        return super().write(data)


def _no_space(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
