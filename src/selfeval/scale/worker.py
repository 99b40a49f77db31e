"""A worker: an actor that loads a model once and computes one task after another. It runs in a process of Ray."""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from selfeval.errors import WorkerError, portable

__all__ = ["Compute", "Failed", "Finished", "Load", "Outcome", "Worker", "WorkerFacts", "write_to_log"]

_LOGGER = logging.getLogger(__name__)

Compute = Callable[[Any, Callable[[float], None]], Any]
"""Computes a task, and reports the share that is done, from 0 to 1."""


class Load(Protocol):
    """The data that a worker loads before its first task: a frozen dataclass of plain settings, picklable and comparable."""

    def __call__(self) -> Compute:
        """Load it, and return the function that computes tasks with it."""
        ...


@dataclass(frozen=True)
class WorkerFacts:
    """Where a worker runs.

    Attributes:
        host: name of its machine.
        pid: its process.
    """

    host: str
    pid: int


@dataclass(frozen=True)
class Finished:
    """A task that was computed."""

    result: Any


@dataclass(frozen=True)
class Failed:
    """A task that raised.

    Attributes:
        error: the error, or a `RuntimeError` with its text if it cannot be pickled.
        traceback: its traceback as text.
    """

    error: Exception
    traceback: str


Outcome = Finished | Failed


class Worker:
    """Computes tasks in a process of its own.

    Args:
        log: file to which the output of the process is appended.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._load: Load | None = None
        self._compute: Compute | None = None
        self._share = 0.0

    def prepare(self, load: Load) -> Outcome:
        """Load what the tasks need, unless it is loaded. The result is `WorkerFacts`."""
        return _outcome(lambda: self._prepare(load))

    def compute(self, task: Any) -> Outcome:
        """Compute a task with what was loaded last."""
        return _outcome(lambda: self._computed(task))

    def share(self) -> float:
        """Return the share of the task in progress that is done. Called from another thread."""
        return self._share

    def _prepare(self, load: Load) -> WorkerFacts:
        if self._load != load:
            if self._load is None:
                write_to_log(self._log)
            # First the memory of the last one: two models may not fit.
            self._load = self._compute = None
            gc.collect()
            started = time.monotonic()
            self._compute, self._load = load(), load
            _LOGGER.info("loaded in %.1f s", time.monotonic() - started)
        return WorkerFacts(platform.node(), os.getpid())

    def _computed(self, task: Any) -> Any:
        assert self._compute is not None, "a task before prepare"
        self._share, started = 0.0, time.monotonic()
        result = self._compute(task, self._report)
        _LOGGER.info("%s in %.2f s", task, time.monotonic() - started)
        return result

    def _report(self, share: float) -> None:
        self._share = share


def write_to_log(log: Path) -> None:
    """Append standard output, standard error and log records of this process to a log.

    Raises:
        WorkerError: the folder of the log does not exist on this machine.
    """
    if not log.parent.is_dir():
        raise WorkerError(
            f"the run folder does not exist on {platform.node()} ({log.parent} is missing there); workers on several "
            "machines need it on a file system that all of them share"
        )
    with suppress(OSError):  # a full disk: the results matter
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
    logging.basicConfig(
        format=f"%(asctime)s %(levelname)s {platform.node()} {os.getpid()} %(name)s: %(message)s",
        level=logging.INFO,
        stream=os.fdopen(os.dup(2), "a", encoding="utf-8", errors="backslashreplace"),
        force=True,
    )


def _outcome(work: Callable[[], Any]) -> Outcome:
    try:
        return Finished(work())
    except Exception as error:
        _LOGGER.exception("failed")
        return Failed(portable(error), traceback.format_exc())
