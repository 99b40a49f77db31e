"""The pool with real workers and tasks that need no model. One Ray for all tests, since it takes seconds to start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_tasks import Add, FailingAdd, Task, local_ray
from selfeval.errors import DataError, WorkerError
from selfeval.scale import pool as pool_module
from selfeval.scale.failures import RETRIES, Failure
from selfeval.scale.pool import Needs, Pool, _Slot


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray(4):
        yield


@pytest.fixture(scope="module")
def two(ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A pool of two workers, which the tests share."""
    pool = Pool(2, Needs(), tmp_path_factory.mktemp("logs"))
    while sum(pool.events.hosts.values()) < 2:  # work begins as soon as the first one is ready
        _results(pool, [Task(n, 0.5) for n in range(4)])
    yield pool
    pool.stop()


def _results(pool: Pool, tasks: list[Task], number: int = 100) -> dict[int, Any]:
    return dict(pool.map(Add(number), tasks))


def test_every_task_is_computed_and_a_long_one_delays_no_other(two: Pool) -> None:
    shares = list[tuple[int, float]]()
    found = list(two.map(Add(100), [Task(0, 2.0), *(Task(n) for n in range(1, 9))], lambda *told: shares.append(told)))
    assert sorted((number, result[0]) for number, result in found) == [(n, 100 + n) for n in range(9)]
    assert found[-1][0] == 0, "the first task takes longest"
    pids = {result[1] for _, result in found}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert (0, 0.5) in shares
    assert two.events.lost == two.events.retried == 0


def test_workers_keep_what_they_loaded_until_they_need_something_else(two: Pool) -> None:
    tasks = [Task(n, 0.1) for n in range(4)]
    first, other = _results(two, tasks), _results(two, tasks, 200)
    assert [first[n][0] for n in range(4)] == [100, 101, 102, 103]
    assert [other[n][0] for n in range(4)] == [200, 201, 202, 203]
    assert sum(two.events.hosts.values()) == 2, "no worker was started again"


def test_a_failing_task_is_retried_on_another_worker(two: Pool, tmp_path: Path) -> None:
    task = Task(7, folder=tmp_path, bad=1)
    # It is the last one, so that both workers are ready when it fails.
    found = _results(two, [*(Task(n, 1.0) for n in range(4)), task])
    assert found[4][0] == 107
    assert len(set(task.attempts())) == 2


def test_a_task_that_always_fails_is_given_up_after_four_attempts(two: Pool, tmp_path: Path) -> None:
    poisoned = Task(7, folder=tmp_path, bad=99)
    found = _results(two, [Task(0), poisoned, Task(2)])
    failure = found[1]
    assert isinstance(failure, Failure)
    assert failure.attempts == 4
    # The idle worker may have begun the task that waited for the other one, which then computes it too.
    assert len(poisoned.attempts()) in (4, 5)
    assert repr(failure.error) == "ValueError('7 cannot be added')"
    assert "_go_wrong(task)" in failure.traceback
    assert [found[0][0], found[2][0]] == [100, 102]


def test_an_error_of_the_user_ends_the_work_at_once(two: Pool, tmp_path: Path) -> None:
    task = Task(7, folder=tmp_path, bad=99, wrong="user")
    with pytest.raises(DataError, match="7 is not allowed; use another number"):
        _results(two, [task])
    assert len(task.attempts()) == 1


def test_a_task_of_a_lost_worker_is_computed_by_another_one(two: Pool, tmp_path: Path) -> None:
    lost, notes = two.events.lost, list[str]()
    two.note = notes.append
    task = Task(7, folder=tmp_path, bad=1, wrong="kills")
    found = _results(two, [task, *(Task(n, 0.1) for n in range(6))])
    assert [found[n][0] for n in range(7)] == [107, *(100 + n for n in range(6))]
    assert len(task.attempts()) == 2
    assert two.events.lost == lost + 1
    assert len(notes) == 1
    assert "was lost and is replaced" in notes[0]
    logs = [path.read_text() for path in two._logs.iterdir()]
    assert sum(log.count("loaded in") for log in logs) >= 3, "the new worker writes to the log of the lost one"


def test_a_task_that_ends_every_worker_is_given_up(two: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_LOSSES", 1)
    task = Task(7, folder=tmp_path, bad=99, wrong="kills")
    failure = _results(two, [task])[0]
    assert isinstance(failure, Failure)
    assert len(task.attempts()) == 2
    assert isinstance(failure.error, WorkerError)
    assert "was lost 2 times" in str(failure.error)


def test_a_slow_worker_loses_its_tasks(two: Pool, tmp_path: Path) -> None:
    repeated, started = two.events.repeated, time.monotonic()
    task = Task(7, folder=tmp_path, bad=1, wrong="hangs")
    found = _results(two, [task, *(Task(n, 0.2) for n in range(6))])
    assert [found[n][0] for n in range(7)] == [107, *(100 + n for n in range(6))]
    assert len(set(task.attempts())) == 2
    assert two.events.repeated > repeated
    assert time.monotonic() - started < 120, "nobody waits for the one that hangs"
    # The other worker does what follows, and the one that hangs is ended with the pool.
    assert _results(two, [Task(1), Task(2)]).keys() == {0, 1}
    two.stop()
    assert _results(two, [Task(3)])[0][0] == 103


def test_a_worker_that_cannot_load_is_replaced(ray: None, tmp_path: Path) -> None:
    notes = list[str]()
    pool = Pool(1, Needs(), tmp_path, note=notes.append)
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    assert dict(pool.map(FailingAdd(attempts, 2), [Task(1)]))[0][0] == 101
    pool.stop()
    assert notes == ["worker 0 could not load the model (RuntimeError: CUDA out of memory) and is replaced"] * 2
    assert pool.events.lost == 2
    assert len({path.name.partition("-")[2] for path in attempts.iterdir()}) == 3, "in a new process each time"


def test_a_worker_that_never_loads_is_left_out_while_others_still_load(tmp_path: Path) -> None:
    notes = list[str]()
    pool = Pool(2, Needs(), tmp_path, note=notes.append)
    pool.slots = [_Slot(number, None, preparing=object(), unloaded=RETRIES) for number in range(2)]
    pool.cannot_load(pool.slots[0], RuntimeError("broken disk"))
    assert [slot.number for slot in pool.slots] == [1]
    assert "4 times; continuing with 1 worker(s)" in notes[0]
    with pytest.raises(RuntimeError, match="broken disk"):
        pool.cannot_load(pool.slots[0], RuntimeError("broken disk"))


def test_a_model_that_no_worker_can_load_ends_the_work(ray: None, tmp_path: Path) -> None:
    pool = Pool(1, Needs(), tmp_path)
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        list(pool.map(FailingAdd(attempts, 99), [Task(1)]))
    pool.stop()
    assert "in __call__" in caught.value.__notes__[0]
    assert len(list(attempts.iterdir())) == 4


def test_a_model_that_is_the_users_fault_is_not_loaded_again(ray: None, tmp_path: Path) -> None:
    pool = Pool(1, Needs(), tmp_path)
    attempts = tmp_path / "attempts"
    attempts.mkdir()
    with pytest.raises(DataError, match="no such model"):
        list(pool.map(FailingAdd(attempts, 99, user=True), [Task(1)]))
    pool.stop()
    assert len(list(attempts.iterdir())) == 1


def test_workers_without_room_are_noted_and_the_others_work(two: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_ROOM", 1.0)
    notes = list[str]()
    two.stop()
    # Each takes three of the four CPUs, so that only one has room.
    pool = Pool(2, Needs(cpus=3), tmp_path, note=notes.append)
    found = _results(pool, [Task(n, 1.0) for n in range(4)])
    pool.stop()
    assert [found[n][0] for n in range(4)] == [100, 101, 102, 103]
    assert notes[-1].startswith(("1 of 2 workers have not started after 1 s", "2 of 2 workers have not started after 1 s"))
    assert len(notes) == 1
