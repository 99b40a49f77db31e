"""Values from files that are computed again only if the files have changed, and slow ones never for most of the time."""

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

    Args:
        most: maximum number of entries; the oldest one is dropped. Default: 64.
        share: largest share of the time that is spent on one entry, in (0, 1]. With 0.05, a value that took 2 s is used for
            38 s more even if the files have changed: eight curves of 100,000 steps take seconds, and a page asks for them
            every two.
            Default: 1, a value of other files is never used.
    """

    def __init__(self, most: int = 64, share: float = 1.0) -> None:
        self._most, self._share = most, share
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, version: Hashable, draw: Callable[[], V]) -> V:
        """Return the value of a key, computed if there is none, or if it is of other files and old enough."""
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
            self._entries[key] = _Entry(version, value, now + (now - begun) * (1 / self._share - 1))
            self._entries.move_to_end(key)
            while len(self._entries) > self._most:
                self._locks.pop(self._entries.popitem(last=False)[0], None)
        return value
