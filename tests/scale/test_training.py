from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ray_tasks import kept_environment
from selfeval.backbone.process_group import ProcessGroup, by_first
from selfeval.errors import LoopError, ProcessGroupError
from selfeval.scale import training
from selfeval.scale.cluster import started
from selfeval.scale.training import Watch, train_on_workers
from selfeval.scale.training_worker import WorkerResources

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray runs its workers at the lowest priority, so on a busy machine the tests would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a worker cannot import this file
    with kept_environment(), started(3):  # it starts Ray again if a busy machine passes the limit of its start
        yield


@dataclass(frozen=True)
class Summing:
    """Sums the ranks; with `dies`, worker 1 is killed as often as there is no file yet."""

    folder: Path
    dies: int = 0
    progresses: bool = False

    def __call__(self, processes: ProcessGroup, send: Callable[[Any], None]) -> dict[str, Any]:
        found = torch.tensor([float(processes.rank)])
        processes.sum(found)
        attempt = by_first(processes, "attempt", self._attempt)
        if self.progresses:
            send(attempt)
        processes.gather(0)
        if attempt <= self.dies and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.gather(1)
        send("done")
        return {"rank": processes.rank, "sum": float(found), "attempt": attempt, "threads": torch.get_num_threads()}

    def _attempt(self) -> int:
        number = len(list(self.folder.iterdir())) + 1
        (self.folder / str(number)).touch()
        return number


@dataclass(frozen=True)
class Failing:
    def __call__(self, processes: ProcessGroup, send: Callable[[Any], None]) -> None:
        if processes.rank == 1:
            raise LoopError("no pair survived")
        processes.gather(0)


def test_the_result_is_that_of_worker_0_and_a_lost_worker_is_replaced(tmp_path: Path) -> None:
    sent: list[Any] = []
    lost: list[str] = []
    started: list[Sequence[int]] = []

    def receive(some: Sequence[Any]) -> bool:
        sent.extend(some)
        return False

    found = train_on_workers(Summing(tmp_path, dies=1), 3, watch=Watch(receive, lost.append, started.append))
    assert found == {"rank": 0, "sum": 3.0, "attempt": 2, "threads": 1}
    assert sent == ["done"]
    assert lost == ["worker 1 of 3 was lost; training resumes from its last checkpoint with new workers"]
    assert [len(set(processes)) for processes in started] == [3, 3]


def test_an_error_arrives_with_its_worker_and_traceback_and_is_not_repeated(tmp_path: Path) -> None:
    started: list[Sequence[int]] = []
    with pytest.raises(LoopError, match="no pair survived") as caught:
        train_on_workers(Failing(), 2, watch=Watch(started=started.append))
    (note,) = caught.value.__notes__
    assert note.startswith("in worker 1 of 2:\nTraceback")
    assert 'raise LoopError("no pair survived")' in note
    assert len(started) == 1


@pytest.mark.slow
def test_losses_without_progress_end_the_training(tmp_path: Path) -> None:
    lost: list[str] = []
    with pytest.raises(ProcessGroupError, match="worker 1 of 2 was lost, 4 times without progress between"):
        train_on_workers(Summing(tmp_path, dies=9), 2, watch=Watch(lost=lost.append))
    assert len(lost) == 3
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
def test_losses_with_progress_between_do_not(tmp_path: Path) -> None:
    found = train_on_workers(Summing(tmp_path, dies=5, progresses=True), 2, watch=Watch(receive=lambda sent: len(sent) > 0))
    assert found["attempt"] == 6


def test_more_workers_than_the_cluster_has_room_for_are_refused() -> None:
    with pytest.raises(ProcessGroupError, match=r"4 workers with 2 CPU\(s\) each are more than the 1 for which the nodes"):
        train_on_workers(Failing(), 4, WorkerResources(cpus=2))


@dataclass(frozen=True)
class Quiet:
    """Sends nothing for some seconds."""

    seconds: float

    def __call__(self, processes: ProcessGroup, send: Callable[[Any], None]) -> int:
        time.sleep(self.seconds)
        return processes.size


def test_a_wait_for_room_and_a_long_silence_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work uses the cluster at first; then the workers send nothing."""
    monkeypatch.setattr(training, "_ROOM", 0.5)
    monkeypatch.setattr(training, "_SILENT", 0.5)
    notes, in_use = list[str](), ray.util.placement_group([{"CPU": 2}])
    assert in_use.wait(60)

    def note(sentence: str) -> None:
        notes.append(sentence)
        if "room" in sentence:
            ray.util.remove_placement_group(in_use)

    assert train_on_workers(Quiet(3.0), 2, watch=Watch(note=note)) == 2
    assert notes[0].startswith("waiting for room for 2 workers with 1 CPU(s) each; other work uses the cluster")
    assert notes[1].startswith("the training has made no progress for 0 minutes")
    # After 0.5 and 1 seconds, and at most 2: each limit is twice the one before.
    assert 2 <= len(notes) <= 4


def test_workers_have_ended_when_the_call_returns(tmp_path: Path) -> None:
    """Otherwise the lock of the run folder would be released while worker 0 still writes."""
    processes = list[int]()
    with pytest.raises(LoopError):
        train_on_workers(Failing(), 2, watch=Watch(started=processes.extend))
    assert len(processes) == 2
    assert [pid for pid in processes if psutil.pid_exists(pid)] == []


def test_every_attempt_has_a_job_of_its_own(tmp_path: Path) -> None:
    jobs = iter([Summing(tmp_path, dies=1), Summing(tmp_path, dies=0)])
    found = train_on_workers(Quiet(0), 2, renewed=lambda job: next(jobs))
    assert found["attempt"] == 2
    assert list(jobs) == []
