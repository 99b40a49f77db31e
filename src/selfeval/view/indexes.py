"""The indexes of the runs that were opened, in a temporary folder that ends with the process."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from fastapi import Request

from selfeval.view.index import RunIndex

__all__ = ["Indexes", "index_of"]


class Indexes:
    """The index of each run, made when a page first needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[Path, RunIndex] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def of(self, folder: Path) -> RunIndex:
        """Return the index of a run folder, or of the folder of a round."""
        with self._lock:
            # A thread may still write when the process ends.
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="selfeval-view-", ignore_cleanup_errors=True)
            if folder not in self._made:
                self._made[folder] = RunIndex(folder, Path(self._folder.name) / f"{len(self._made)}.sqlite")
            return self._made[folder]


def index_of(request: Request, folder: Path) -> RunIndex:
    """Return the index of a run for a page."""
    indexes: Indexes = request.state.indexes
    return indexes.of(folder)
