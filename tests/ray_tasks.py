"""Tasks for the workers of a pool. In a module of its own, because a worker imports it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.errors import DataError
from selfeval.scale.cluster import Cluster, started

__all__ = ["Add", "FailingAdd", "Task", "kept_environment", "local_ray"]


@contextmanager
def kept_environment() -> Iterator[None]:
    """Restore the environment at the end: Ray sets variables such as `PYTHONBREAKPOINT`, which other tests would inherit.

    Its token stays: this process reads it once, so another Ray that it starts later needs the same.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        token = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
        os.environ.clear()
        os.environ.update(before | token)


@contextmanager
def local_ray(workers: int) -> Iterator[Cluster]:
    """Start Ray for a few workers, which find the modules of the tests."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    with kept_environment():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with started(workers) as cluster:
            yield cluster


@dataclass(frozen=True)
class Task:
    """A number, and what happens before it is added to what the worker has loaded.

    Attributes:
        number: the number.
        seconds: time that it takes.
        folder: Optional. Each attempt leaves a file with its process here.
        bad: number of first attempts that go wrong.
        wrong: what goes wrong.
    """

    number: int
    seconds: float = 0.0
    folder: Path | None = None
    bad: int = 0
    wrong: str = "raises"

    def attempts(self) -> list[str]:
        """Return the processes of the attempts so far, in order."""
        assert self.folder is not None
        return [path.read_text() for path in sorted(self.folder.glob(f"{self.number}-*"))]


@dataclass(frozen=True)
class Add:
    """Loads a number."""

    number: int

    def __call__(self) -> Callable[[Any, Callable[[float], None]], Any]:
        def compute(task: Task, report_progress: Callable[[float], None]) -> tuple[int, int]:
            before = 0
            if task.folder is not None:
                before = len(task.attempts())
                (task.folder / f"{task.number}-{before}").write_text(str(os.getpid()))
            report_progress(0.5)
            time.sleep(task.seconds)
            if before < task.bad:
                _go_wrong(task)
            return self.number + task.number, os.getpid()

        return compute


@dataclass(frozen=True)
class FailingAdd:
    """Loads the number 100 after some attempts that fail.

    Attributes:
        folder: each attempt leaves a file here.
        failing: number of first attempts that fail.
        user: whether the error is the user's.
    """

    folder: Path
    failing: int
    user: bool = False

    def __call__(self) -> Callable[[Any, Callable[[float], None]], Any]:
        number = len(list(self.folder.iterdir()))
        (self.folder / f"{number}-{os.getpid()}").touch()
        if number < self.failing:
            raise DataError("there is no such model; use another one") if self.user else RuntimeError("CUDA out of memory")
        return Add(100)()


def _go_wrong(task: Task) -> None:
    if task.wrong == "kills":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.wrong == "hangs":
        time.sleep(600)
    if task.wrong == "user":
        raise DataError(f"{task.number} is not allowed; use another number")
    raise ValueError(f"{task.number} cannot be added")
