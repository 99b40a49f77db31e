"""The label sessions of the pages: one task for each run, shared by its raters."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from selfeval.runs.labelling import LabelSession, LabelTask

__all__ = ["LabelDesk"]

_READ = ("evaluation/scored.jsonl", "evaluation/figures.json", "verdicts/manifest.json")
"""Files that a task is read from; when one of them changes, it is read again."""


@dataclass
class LabelDesk:
    """Label sessions by run and rater.

    Attributes:
        rater: Optional. Name that the form proposes. Default: none.
        for_training: label pairs of training questions, whose labels may be trained on. Default: False.
        most: Optional. Number of pairs of a session. Default: all.
    """

    rater: str = ""
    for_training: bool = False
    most: int | None = None
    _tasks: dict[Path, tuple[object, LabelTask]] = field(default_factory=dict, repr=False)
    _sessions: dict[tuple[Path, str], LabelSession] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def task(self, folder: Path) -> LabelTask:
        """Return the pairs of a run to label.

        Raises:
            RunFolderError: there are none yet, or a file is damaged.
        """
        with self._lock:
            state = [_state(folder / name) for name in _READ]
            known = self._tasks.get(folder)
            if known is None or known[0] != state:
                known = self._tasks[folder] = state, LabelTask(folder, for_training=self.for_training)
                self._sessions = {key: session for key, session in self._sessions.items() if key[0] != folder}
            return known[1]

    def session(self, folder: Path, rater: str) -> LabelSession:
        """Return the session of a rater.

        Raises:
            InputError: the name is not allowed.
            RunFolderError: see `task`.
        """
        task = self.task(folder)
        with self._lock:
            key = folder, rater.strip()
            if key not in self._sessions:
                self._sessions[key] = LabelSession(task, rater, self.most)
            return self._sessions[key]


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
