"""A pool of workers: hands out tasks, replaces lost workers, and repeats slow and failed tasks.

Every worker has at most two tasks, one that it computes and one that waits, so that it is never idle while a result is written.
Results are fetched when they are yielded. Memory therefore does not grow with the number of tasks.

A task may be computed twice: by a second worker if the first one is slow. Results do not depend on the worker, so the first one
counts.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from selfeval.errors import InputError, WorkerError
from selfeval.scale.cluster import ray_library, refuse_without_nodes
from selfeval.scale.failures import RETRIES, Failure
from selfeval.scale.worker import Failed, Finished, Load, Outcome, Worker, WorkerFacts

__all__ = ["Needs", "Pool", "PoolEvents"]

_LOGGER = logging.getLogger(__name__)

_IN_FLIGHT = 2
"""Tasks of a worker at a time."""
_LOOK = 0.5
"""Seconds between two looks at the shares of the tasks in progress and at slow workers."""
_SHORTEST = 1.0
"""Seconds below which no task is called slow."""
_LOSSES = 10
"""Lost workers after which a task is no longer repeated: it may be the one that kills them."""
_ROOM = 30.0
"""Seconds without an answer of a new worker after which a note says so."""
_CONTROL = "control"
"""Thread of a worker that answers while another one computes."""


@dataclass(frozen=True)
class Needs:
    """The resources of one worker.

    Attributes:
        cpus: units of the resource CPU.
        gpus: number of GPUs. Default: none.
    """

    cpus: int = 1
    gpus: int = 0


@dataclass
class PoolEvents:
    """The events of a pool.

    Attributes:
        hosts: number of workers that were started, by machine.
        lost: workers that ended before they should.
        retried: tasks that were repeated because they raised or their worker was lost.
        repeated: tasks that were given to a second worker because the first one was slow.
        starting: seconds in which tasks waited for the first worker to load the model.
    """

    hosts: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    retried: int = 0
    repeated: int = 0
    starting: float = 0.0


@dataclass
class _Call:
    """A task that a worker has.

    Attributes:
        task: number of the task; None if its result is not needed any more.
        begun: when the worker began to compute it, by the monotonic clock; None while it waits.
    """

    task: int | None
    reference: Any
    begun: float | None = None


@dataclass
class _Slot:
    """A place for a worker, which another one takes if it is lost.

    Attributes:
        number: number of the worker, which names its log.
        actor: the worker.
        pid: its process; 0 if it has never been ready.
        since: when it was asked for, by the monotonic clock.
        runs: whether its process has answered; without room in the cluster there is none.
        unloaded: number of times in a row that a worker in this place could not load the model.
        preparing: reference to its answer to `prepare`; None if it is ready.
        calls: its tasks, in the order in which it computes them.
        asked: reference to the share that is done; None if it was not asked.
    """

    number: int
    actor: Any
    pid: int = 0
    since: float = 0.0
    runs: bool = False
    unloaded: int = 0
    preparing: Any = None
    calls: deque[_Call] = field(default_factory=deque)
    asked: Any = None

    def references(self) -> Iterator[Any]:
        yield from (found for found in (self.preparing, self.asked) if found is not None)
        yield from (call.reference for call in self.calls)


class Pool:
    """Workers that keep what they have loaded until they are stopped. Use it in one thread.

    Args:
        size: number of workers. Workers for which the cluster has no room start as soon as there is.
        needs: resources of one worker.
        logs: folder of the logs; on several machines, one that they share.
        slow: multiple of the median time of a task after which an idle worker repeats it.
        note: receives a sentence about a lost worker. Default: does nothing.
    """

    def __init__(
        self,
        size: int,
        needs: Needs,
        logs: Path,
        *,
        slow: float = 3.0,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.size, self.needs, self._logs, self.slow, self.note = size, needs, logs, slow, note
        self.events = PoolEvents()
        self.slots: list[_Slot] = []
        self._load: Load | None = None
        self._lost_in_a_row = 0
        self._started: float | None = None
        self._said_waiting = False

    def map(
        self, load: Load, tasks: Sequence[Any], report_progress: Callable[[int, float], None] = lambda task, share: None
    ) -> Iterator[tuple[int, Any]]:
        """Compute tasks; yield the number of each with its result, or with a `Failure`, as soon as it is known.

        Args:
            load: what the workers load, if they have not loaded it yet.
            tasks: the tasks.
            report_progress: Optional. Receives the number of a task and the share of it that is done. Default: does nothing.

        Raises:
            InputError: a task or the loading raised it.
            WorkerError: workers are lost again and again before they are ready, or Ray has ended.
            Exception: no worker can load the model; the error of the last one.
        """
        if not tasks:
            return
        self._start(load)
        yield from _Mapping(self, tasks, report_progress).run()

    def stop(self) -> None:
        """Stop the workers and free their memory. The next tasks start new ones."""
        for slot in self.slots:
            self._end(slot)
        self.slots = []

    def _start(self, load: Load) -> None:
        self._load = load
        if not self.slots:
            self._started = time.monotonic()
        for slot in self.slots:
            slot.preparing = slot.actor.prepare.remote(load)
        while len(self.slots) < self.size:
            slot = _Slot(len(self.slots), None)
            self._fill(slot)
            self.slots.append(slot)

    @cached_property
    def _actor(self) -> Any:
        # Lost workers are replaced here, because Ray's own restart refuses tasks until it is over.
        options = {"num_cpus": self.needs.cpus, "num_gpus": self.needs.gpus, "max_restarts": 0, "max_task_retries": 0}
        return ray_library().remote(**options, concurrency_groups={_CONTROL: 1})(Worker)

    def _fill(self, slot: _Slot) -> None:
        """Start a worker in a slot."""
        slot.actor = self._actor.remote(self._logs / f"worker-{slot.number}.log")
        slot.pid, slot.calls, slot.since, slot.runs = 0, deque(), time.monotonic(), False
        slot.preparing = slot.actor.prepare.remote(self._load)
        slot.asked = share_of(slot.actor)  # answered as soon as its process runs, also while it loads

    def _end(self, slot: _Slot) -> None:
        with suppress(Exception):  # it may be lost already, or the connection is
            ray_library().kill(slot.actor, no_restart=True)

    def replace(self, slot: _Slot, error: Exception) -> None:
        """Start another worker in place of a lost one.

        Raises:
            WorkerError: none has become ready for a long time.
        """
        reason = str(error).strip().splitlines()[:1]
        _LOGGER.info("lost worker %d: %s", slot.number, error)
        self.events.lost += 1
        # A worker that was ready is lost by a kill or with its machine; one that never becomes ready has another cause.
        self._lost_in_a_row = self._lost_in_a_row + 1 if slot.preparing is not None else 0
        if self._lost_in_a_row > _LOSSES * self.size:
            raise WorkerError(
                f"{self._lost_in_a_row} workers were lost one after another before they were ready (the last one: "
                f"{reason[0] if reason else type(error).__name__}); see {self._logs}, and use fewer workers if their memory "
                "was exhausted"
            ) from error
        self.note(f"worker {slot.number} was lost and is replaced")
        self._end(slot)
        self._fill(slot)

    def cannot_load(self, slot: _Slot, error: Exception) -> None:
        """Start another worker in place of one that could not load the model, or continue without it after three retries.

        Its machine may have no room for the model yet: that of a killed process is not free at once.

        Raises:
            Exception: the error, if no other worker is left.
        """
        slot.unloaded += 1
        said = f"worker {slot.number} could not load the model ({type(error).__name__}: {error})"
        if slot.unloaded <= RETRIES:
            self.events.lost += 1
            self.note(f"{said} and is replaced")
            self._end(slot)
            self._fill(slot)
            return
        if len(self.slots) == 1:
            raise error
        self.note(f"{said} {slot.unloaded} times; continuing with {len(self.slots) - 1} worker(s)")
        self._end(slot)
        self.slots.remove(slot)
        self.size -= 1

    def look_for_room(self) -> None:
        """Say once that workers have not started for long.

        Raises:
            WorkerError: none can start any more.
        """
        if not any(slot.runs for slot in self.slots):
            refuse_without_nodes()
        late = [slot for slot in self.slots if not slot.runs and time.monotonic() - slot.since > _ROOM]
        if late and not self._said_waiting:
            self._said_waiting = True
            self.note(
                f"{len(late)} of {len(self.slots)} workers have not started after {_ROOM:.0f} s: the cluster has no room for "
                "them at the moment, or is slow. They begin as soon as there is room"
            )

    def is_ready(self, slot: _Slot, facts: WorkerFacts) -> None:
        """Note that a worker is ready."""
        slot.preparing, slot.unloaded, self._lost_in_a_row = None, 0, 0
        if self._started is not None:
            self.events.starting += time.monotonic() - self._started
            self._started = None
        if facts.pid != slot.pid:  # for each round it loads another model
            slot.pid = facts.pid
            self.events.hosts[facts.host] += 1


def share_of(actor: Any) -> Any:
    """Ask a worker for the share of its task that is done; return the reference to its answer."""
    return actor.share.options(concurrency_group=_CONTROL).remote()


class _Mapping:
    """The tasks of one call of `Pool.map`."""

    def __init__(self, pool: Pool, tasks: Sequence[Any], report_progress: Callable[[int, float], None]) -> None:
        self._pool, self._tasks, self._report = pool, tasks, report_progress
        self._ray = ray_library()
        self._waiting = deque(range(len(tasks)))
        self._done: set[int] = set()
        self._seconds: list[float] = []
        self._attempts: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._failed_on: dict[int, set[int]] = defaultdict(set)
        self._looked = 0.0
        for slot in pool.slots:
            for call in slot.calls:  # of an earlier call, computed elsewhere in the meantime
                call.task = None

    def run(self) -> Iterator[tuple[int, Any]]:
        while len(self._done) < len(self._tasks):
            # Everyone gets one task before anyone gets a second one.
            for most in range(1, _IN_FLIGHT + 1):
                for slot in self._pool.slots:
                    self._hand_out(slot, most)
            references = [reference for slot in self._pool.slots for reference in slot.references()]
            found, _ = self._ray.wait(references, num_returns=1, timeout=_LOOK)
            for reference in found:
                yield from self._arrived(reference)
            self._look()
        self._cancel_the_rest()

    # -- handing out ----------------------------------------------------------------------------------------------------

    def _hand_out(self, slot: _Slot, most: int) -> None:
        """Give a worker tasks until it has `most`, or one of a slower worker if it is idle."""
        while slot.preparing is None and len(slot.calls) < most:
            task = self._next_for(slot)
            if task is None and not slot.calls:
                task = self._of_a_slower_worker(slot)
                self._pool.events.repeated += task is not None
            if task is None:
                return
            begun = None if slot.calls else time.monotonic()
            slot.calls.append(_Call(task, slot.actor.compute.remote(self._tasks[task]), begun))

    def _next_for(self, slot: _Slot) -> int | None:
        """Take the next task that this worker should try: one that failed here should be tried elsewhere."""
        for task in self._waiting:
            elsewhere = any(other.number not in self._failed_on[task] for other in self._pool.slots if other.preparing is None)
            if slot.number not in self._failed_on[task] or not elsewhere:
                self._waiting.remove(task)
                return task
        return None

    def _of_a_slower_worker(self, slot: _Slot) -> int | None:
        """Return a task that waits for a busy worker, or that takes much longer than others, if nobody else repeats it."""
        calls = [call for other in self._pool.slots for call in other.calls if call.task is not None]
        copies = Counter(call.task for call in calls)
        alone = [c for c in calls if copies[c.task] == 1 and slot.number not in self._failed_on[c.task or 0]]
        if waiting := next((call for call in alone if call.begun is None), None):
            # Moved rather than copied, unless it has begun in the meantime: then the first result counts.
            self._ray.cancel(waiting.reference)
            return waiting.task
        slow = next((call for call in alone if self._is_slow(call)), None)
        return None if slow is None else slow.task

    def _is_slow(self, call: _Call) -> bool:
        if not self._seconds or call.begun is None:
            return False
        limit = max(_SHORTEST, self._pool.slow * statistics.median(self._seconds))
        return time.monotonic() - call.begun > limit

    # -- results --------------------------------------------------------------------------------------------------------

    def _arrived(self, reference: Any) -> Iterator[tuple[int, Any]]:
        slot = next((slot for slot in self._pool.slots if reference in slot.references()), None)
        if slot is None:  # of a worker that was replaced
            return
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            task = self._forget(slot, reference).task
            # The worker to which it was moved may have been lost before this one gave it up.
            if task is not None and task not in self._done:
                self._again(task)
        except self._ray.exceptions.RayTaskError as error:
            # Outside of the work: what was sent to the worker cannot be unpickled there, for example.
            yield from self._settle(slot, reference, Failed(RuntimeError(str(error)), str(error)))
        except self._ray.exceptions.RayError as error:
            yield from self._lost(slot, error)
        else:
            yield from self._settle(slot, reference, outcome)

    def _settle(self, slot: _Slot, reference: Any, outcome: Any) -> Iterator[tuple[int, Any]]:
        if reference == slot.preparing:
            self._prepared(slot, outcome)
        elif reference == slot.asked:
            self._share_arrived(slot, outcome)
        else:
            call = self._forget(slot, reference)
            if call.task is not None and call.task not in self._done:
                yield from self._computed(slot, call.task, call, outcome)

    def _prepared(self, slot: _Slot, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            outcome.error.add_note(outcome.traceback)
            if isinstance(outcome.error, InputError):
                raise outcome.error
            self._pool.cannot_load(slot, outcome.error)
            return
        self._pool.is_ready(slot, outcome.result)

    def _share_arrived(self, slot: _Slot, share: float) -> None:
        slot.asked, slot.runs = None, True
        if slot.calls and (task := slot.calls[0].task) is not None and task not in self._done:
            self._report(task, share)

    def _forget(self, slot: _Slot, reference: Any) -> _Call:
        """Remove a call; the next one of the worker begins."""
        call = next(call for call in slot.calls if call.reference == reference)
        slot.calls.remove(call)
        if slot.calls and slot.calls[0].begun is None:
            slot.calls[0].begun = time.monotonic()
        return call

    def _computed(self, slot: _Slot, task: int, call: _Call, outcome: Outcome) -> Iterator[tuple[int, Any]]:
        if isinstance(outcome, Finished):
            if call.begun is not None:
                self._seconds.append(time.monotonic() - call.begun)
            self._finish(task)
            yield task, outcome.result
            return
        if isinstance(outcome.error, InputError):
            raise outcome.error
        self._attempts[task] += 1
        self._failed_on[task].add(slot.number)
        _LOGGER.info("task %d failed on worker %d: %r", task, slot.number, outcome.error)
        if self._attempts[task] > RETRIES:
            self._finish(task)
            yield task, Failure(outcome.error, outcome.traceback, self._attempts[task])
            return
        self._again(task)

    def _finish(self, task: int) -> None:
        """Note that a task is done, and cancel its copies."""
        self._done.add(task)
        with suppress(ValueError):
            self._waiting.remove(task)
        for slot in self._pool.slots:
            for call in slot.calls:
                if call.task == task:
                    self._cancel(call)

    def _again(self, task: int) -> None:
        """Let a task be computed again, unless another worker has it."""
        if task not in self._waiting and not any(call.task == task for slot in self._pool.slots for call in slot.calls):
            self._pool.events.retried += 1
            # First: the others of its age are done.
            self._waiting.appendleft(task)

    def _lost(self, slot: _Slot, error: Exception) -> Iterator[tuple[int, Any]]:
        calls = [call for call in slot.calls if call.task is not None and call.task not in self._done]
        self._pool.replace(slot, error)
        for call in reversed(calls):
            task = call.task
            assert task is not None
            # The others waited, so they cannot be the reason.
            self._losses[task] += call.begun is not None
            if self._losses[task] > _LOSSES:
                text = f"the worker that computed it was lost {self._losses[task]} times"
                self._finish(task)
                yield task, Failure(WorkerError(f"{text}; see the logs of the workers"), text, self._losses[task])
            else:
                self._again(task)

    # -- looking at work in progress ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask busy workers for their shares, twice a second at most."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self._looked = time.monotonic()
        self._pool.look_for_room()
        for slot in self._pool.slots:
            if slot.asked is None and slot.preparing is None and slot.calls:
                slot.asked = share_of(slot.actor)

    def _cancel(self, call: _Call) -> None:
        """Do not wait for a call any more. One that is being computed runs to its end, since it cannot be interrupted."""
        call.task = None
        if call.begun is None:
            with suppress(Exception):  # its worker may be lost, which the next look finds
                self._ray.cancel(call.reference)

    def _cancel_the_rest(self) -> None:
        for slot in self._pool.slots:
            for call in slot.calls:
                self._cancel(call)
