"""Changes of run folders in this process: a lock that holds them, and functions that are called after each of them.

A copy of a run folder is a state in which a killed process could have left it, as long as no file is renamed while the copy is
made. So renames take the lock, and `selfeval.store.remote` takes it while it lists a folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CHANGING", "notify", "observing"]

CHANGING = threading.RLock()
"""Held while files of a run folder are renamed, and while one is listed."""

_observers: list[Callable[[Path], None]] = []


@contextmanager
def observing(observer: Callable[[Path], None]) -> Iterator[None]:
    """Call `observer` with the path of every file or folder that is written while the block runs, in the writing thread."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def notify(path: Path) -> None:
    """Call the observers.

    Raises:
        InputError: an observer cannot keep up with the changes, for example because nothing can be uploaded any more.
    """
    for observer in tuple(_observers):
        observer(path)
