"""The label sessions of the pages: one task for each run, shared by its raters."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from selfeval.runs.labelling import LabelSession, LabelTask

__all__ = ["LabelDesk"]

_MOST_SESSIONS = 1000
"""Sessions that are kept. A name in an address begins one, so their number needs a limit."""


@dataclass
class LabelDesk:
    """Label sessions by run and rater.

    Attributes:
        rater: Optional. Name that the form proposes. Default: none.
        for_training: label pairs of training questions, whose labels may be trained on. Default: False.
        most: Optional. Number of pairs of a session. Default: all.
        prefer: Optional. Pairs that come early; see `LabelTask`. Default: as the saved order.
    """

    rater: str = ""
    for_training: bool = False
    most: int | None = None
    prefer: str | None = None
    _tasks: dict[Path, LabelTask] = field(default_factory=dict, repr=False)
    _sessions: dict[tuple[Path, str], LabelSession] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def task(self, folder: Path) -> LabelTask:
        """Return the pairs of a run to label, read again if its files have changed.

        Raises:
            RunFolderError: there are none yet, or a file is damaged.
        """
        with self._lock:
            known = self._tasks.get(folder)
            if known is None or not known.is_current:
                known = self._tasks[folder] = LabelTask(folder, for_training=self.for_training, prefer=self.prefer)
            return known

    def session(self, folder: Path, rater: str) -> LabelSession:
        """Return the session of a rater.

        Raises:
            InputError: the name is not allowed.
            RunFolderError: see `task`.
        """
        task = self.task(folder)
        with self._lock:
            key = folder, rater.strip()
            # Removed and inserted: the first key is the session that was not used for the longest time.
            known = self._sessions.pop(key, None)
            # Another thread may have read the run again in between, so the task is compared, too.
            session = known if known is not None and known.task is task else LabelSession(task, rater, self.most)
            self._sessions[key] = session
            if len(self._sessions) > _MOST_SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            return session
