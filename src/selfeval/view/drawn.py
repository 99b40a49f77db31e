"""Charts that are drawn again only if their files have changed, and never for more than a small part of the time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

__all__ = ["Drawn", "version_of"]

V = TypeVar("V")

_SHARE = 0.05
"""Largest share of the time that is spent on drawing one entry again and again."""


def version_of(paths: Iterable[Path]) -> Hashable:
    """Return a value that changes when a file is written, created or removed."""
    return tuple((str(path), *_facts(path)) for path in paths)


def _facts(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_mtime_ns, found.st_size


@dataclass
class _Entry(Generic[V]):
    version: Hashable
    value: V
    until: float


class Drawn(Generic[V]):
    """A cache by key, for values that are slow to compute from files which grow while a page is open.

    A value that took s seconds is used for at least 19 s seconds, even if the files have changed: eight curves of 100,000 steps
    take seconds, and a page asks for them every two.

    Args:
        most: maximum number of entries; the one that was not asked for longest is dropped.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, version: Hashable, draw: Callable[[], V]) -> V:
        """Return the value of a key, computed if there is none, or if it is of another version and old enough."""
        with self._lock:
            entry, drawing = self._entries.get(key), self._locks.setdefault(key, threading.Lock())
        if entry is not None and self._is_current(entry, version):
            return entry.value
        # While another thread draws, a page shows what there is.
        if not drawing.acquire(blocking=entry is None):
            assert entry is not None
            return entry.value
        try:
            with self._lock:
                entry = self._entries.get(key)
            if entry is not None and self._is_current(entry, version):
                return entry.value
            return self._drawn(key, version, draw)
        finally:
            drawing.release()

    def _is_current(self, entry: _Entry[V], version: Hashable) -> bool:
        return entry.version == version or time.monotonic() < entry.until

    def _drawn(self, key: Hashable, version: Hashable, draw: Callable[[], V]) -> V:
        begun = time.monotonic()
        value = draw()
        now = time.monotonic()
        with self._lock:
            self._entries[key] = _Entry(version, value, now + (now - begun) * (1 / _SHARE - 1))
            self._entries.move_to_end(key)
            while len(self._entries) > self._most:
                self._locks.pop(self._entries.popitem(last=False)[0], None)
        return value
