"""Whether a process is working on a run, which run.json alone does not say: a killed process leaves its status `running`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from selfeval.runs.reader import RunReader
from selfeval.store import Progress, is_locked, read_progress, read_run

__all__ = ["STOPPED", "Activity", "activity", "activity_of"]

STOPPED = "stopped"
"""Status of a run whose process has ended without writing another one: it was killed, or the machine was switched off."""
_SILENT = 60.0
"""Seconds without a sign of life after which a process counts as ended; it writes one every 10 seconds."""


@dataclass(frozen=True)
class Activity:
    """The facts about the process of a run.

    Attributes:
        status: the status of run.json, or `stopped` if it is `running` and no process is.
        progress: what the process is working on; None if none is running, or if it writes no progress.
    """

    status: str
    progress: Progress | None = None

    @property
    def is_running(self) -> bool:
        """Whether a process is working on the run."""
        return self.status == "running"


def activity(folder: Path, status: str) -> Activity:
    """Return the activity of a run.

    On the machine of the run the lock decides, if the system lists locks, and elsewhere the age of the progress.

    Args:
        folder: folder of the run, not of a later round.
        status: its status in run.json.
    """
    found, locked = read_progress(folder), is_locked(folder)
    if found is None:
        # A version without progress wrote the run, or its process has just begun.
        return Activity(STOPPED if status == "running" and locked is False else status)
    progress, age = found
    alive = age < _SILENT if locked is None or progress.host != platform.node() else locked
    if alive:
        # `selfeval tune` writes no status; and one that sets results aside has not written it yet.
        return Activity("running", progress)
    return Activity(STOPPED if status == "running" else status)


def activity_of(reader: RunReader) -> Activity:
    """Return the activity of the run that a round belongs to."""
    return activity(reader.root, str(read_run(reader.root).get("status", "unknown")))
