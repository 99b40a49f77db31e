"""Data-parallel training on Ray: workers that form one process group, and a new set of workers after the loss of one.

Plain actors, not Ray Train: checkpoints, metrics and results are those of a training in one process, so nothing of Ray Train
but its restart would be used; it repeats a training also after an error of the user, and without a dashboard it logs an error
per second. Ray has to be connected before.
"""

from __future__ import annotations

import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil

from selfeval.errors import ProcessGroupError
from selfeval.scale.cluster import ray_library, refuse_without_nodes, room
from selfeval.scale.training_worker import FailedJob, Job, Meeting, TrainingWorker, WorkerResources
from selfeval.scale.worker import WorkerFacts

__all__ = ["Watch", "train_on_workers"]

_LOSSES = 3
"""Losses of a worker in a row, without progress between them, after which a training gives up."""
_POLL, _GRACE = 0.5, 10.0
"""Seconds between looks at the workers, and seconds in which Ray notices that a worker has died after another has lost it."""
_ROOM = 30.0
"""Seconds of waiting for room in the cluster after which a note says so."""
_SILENT = 600.0
"""Seconds without any progress after which a note says so, and again after twice that time, four times, ..."""
_ENDING = 10.0
"""Seconds in which killed workers end."""

_CONNECTION = re.compile(
    r"gloo/transport.*(closed by peer|reset by peer|Broken pipe)|NCCL.*(remote process exited|unhandled system error)", re.S
)
"""Messages of torch's backends, which have no class for a lost connection."""


_ONE_CPU = WorkerResources()


class _LostError(Exception):
    """A worker was lost; the message says which."""


@dataclass(frozen=True)
class Watch:
    """Callbacks about a training, called in the process that started the workers. Default: they do nothing.

    Attributes:
        receive: called with what worker 0 has sent, returns whether the job got further than ever before.
        lost: called with a sentence after a worker was lost.
        started: called with the process ids of the workers, whenever they have started.
        note: called with a sentence about a long wait.
    """

    receive: Callable[[Sequence[Any]], bool] = lambda sent: False
    lost: Callable[[str], None] = lambda sentence: None
    started: Callable[[Sequence[int]], None] = lambda processes: None
    note: Callable[[str], None] = lambda sentence: None


def train_on_workers(
    job: Job,
    workers: int,
    resources: WorkerResources = _ONE_CPU,
    *,
    logs: Path | None = None,
    watch: Watch = Watch(),
    renewed: Callable[[Job], Job] = lambda job: job,
) -> Any:
    """Do a job on workers that train together. If one is lost, all start again, and the job resumes from its checkpoint.

    Args:
        job: the work.
        workers: number of workers.
        resources: Optional. Resources of each worker. Default: one CPU.
        logs: Optional. Folder with a log for each worker, `worker-N.log`; on several machines, one that they share.
        watch: Optional. Callbacks. Default: they do nothing.
        renewed: Optional. Called before workers start, also after a loss, returns their job. Default: the job itself.

    Returns:
        The result of worker 0.

    Raises:
        ProcessGroupError: Ray is not connected or lacks the resources, or workers were lost without progress between.
        WorkerError: Ray has ended.
        Exception: the first error of a worker, with its rank and traceback as a note.
    """
    ray = ray_library()
    _check_room(ray, workers, resources)
    losses = 0
    while True:
        attempt = _Attempt(ray, workers, resources, logs, watch)
        try:
            return attempt.run(renewed(job))
        except _LostError as error:
            losses = 1 if attempt.progressed else losses + 1
            if losses > _LOSSES:
                raise _lost_too_often(error, losses, logs) from error
            seen = f" (see {logs})" if logs else ""
            watch.lost(f"{error}{seen}; training resumes from its last checkpoint with new workers")


def _check_room(ray: Any, workers: int, resources: WorkerResources) -> None:
    """Refuse what the cluster cannot give, even if nothing else runs there."""
    if not ray.is_initialized():
        raise ProcessGroupError("training on several workers needs a connection to Ray")
    most = room([node["Resources"] for node in ray.nodes() if node["Alive"]], resources.cpus, resources.gpus)
    if workers > most:
        raise ProcessGroupError(
            f"{workers} workers with {_needs(resources)} each are more than the {most} for which the nodes of the cluster have "
            "room; use fewer workers, or a larger cluster"
        )


def _needs(resources: WorkerResources) -> str:
    return f"{resources.cpus} CPU(s)" + (f" and {resources.gpus} GPU(s)" if resources.gpus else "")


def _lost_too_often(error: Exception, losses: int, logs: Path | None) -> ProcessGroupError:
    return ProcessGroupError(
        f"{error}, {losses} times without progress between; look for the reason (often a lack of memory) in "
        f"{logs or 'the logs of Ray'}, then repeat the command to resume from the last checkpoint"
    )


class _Attempt:
    """The work of one set of workers, which end with it.

    Attributes:
        progressed: whether the job got further than ever before.
    """

    def __init__(self, ray: Any, workers: int, resources: WorkerResources, logs: Path | None, watch: Watch) -> None:
        self._ray, self._size, self._resources, self._logs, self._watch = ray, workers, resources, logs, watch
        self.progressed = False
        self._room: Any = None
        self._actors: list[Any] = []
        self._tasks: dict[Any, int] = {}
        self._here: list[psutil.Process] = []

    def run(self, job: Job) -> Any:
        """Do the job on new workers and return the result of worker 0.

        Raises:
            _LostError: a worker was lost.
        """
        private = mkdtemp()
        try:
            self._reserve()
            address = self._start()
            if len([node for node in self._ray.nodes() if node["Alive"]]) == 1:
                # On one machine nobody else should be able to join: a private file instead of a port that is open to the
                # network.
                address = f"file://{private}/processes"
            put, meeting = self._ray.put(job), Meeting(address, self._size)
            self._tasks = {a.work.remote(put, rank, meeting, self._resources): rank for rank, a in enumerate(self._actors)}
            return self._result()
        finally:
            self._end()
            shutil.rmtree(private, ignore_errors=True)

    def _reserve(self) -> None:
        """Wait until there is room for all workers; without all of them none could begin."""
        bundle = {"CPU": self._resources.cpus, "GPU": self._resources.gpus}
        self._room = self._ray.util.placement_group([{k: v for k, v in bundle.items() if v}] * self._size, strategy="PACK")
        started, said = time.monotonic(), False
        while not self._room.wait(1):  # short waits, because Ctrl-C does not interrupt one
            refuse_without_nodes()
            if not said and time.monotonic() - started > _ROOM:
                said = True
                self._watch.note(
                    f"waiting for room for {self._size} workers with {_needs(self._resources)} each; other work uses the "
                    "cluster, or a node of it is lost"
                )

    def _start(self) -> str:
        """Start the workers, and return an address at which they can meet."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        kind = self._ray.remote(
            num_cpus=self._resources.cpus, num_gpus=self._resources.gpus, max_concurrency=2, max_restarts=0
        )(TrainingWorker)
        for number in range(self._size):
            place = PlacementGroupSchedulingStrategy(self._room, placement_group_bundle_index=number)
            log = self._logs / f"worker-{number}.log" if self._logs else None
            self._actors.append(kind.options(scheduling_strategy=place).remote(log))
        answers = [self._actors[0].address.remote(), *(actor.facts.remote() for actor in self._actors)]
        while self._ray.wait(answers, num_returns=len(answers), timeout=1)[1]:
            refuse_without_nodes()
        try:
            address, *facts = self._ray.get(answers)
        except self._ray.exceptions.RayError as error:
            raise _LostError(f"one of {self._size} workers was lost while they started") from error
        self._here = _processes_here(facts)
        self._watch.started([found.pid for found in facts])
        return str(address)

    def _end(self) -> None:
        """Kill the workers, and wait until they have ended: a killed one may still write for a moment."""
        for actor in self._actors:
            with suppress(Exception):  # it may be lost already, or the connection is
                self._ray.kill(actor)
        if self._tasks:
            with suppress(Exception):
                self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=_ENDING)
        psutil.wait_procs(self._here, timeout=_ENDING)
        if self._room is not None:
            with suppress(Exception):
                self._ray.util.remove_placement_group(self._room)

    # -- the result -----------------------------------------------------------------------------------------------------

    def _result(self) -> Any:
        """Wait for the workers and return the result of worker 0."""
        pending, results, until = list(self._tasks), dict[int, Any](), float("inf")
        silence = _Silence(self._watch.note)
        while pending and time.monotonic() < until:
            done, pending = self._ray.wait(pending, timeout=_POLL)
            results |= self._arrived(done, silence)
            if until == float("inf") and _errors(results):
                # The others of a lost worker fail at once, and Ray notices the loss later.
                until = time.monotonic() + _GRACE
        failed = _errors(results)
        if failed and all(_is_lost_connection(error) for error in failed):
            raise _LostError(self._loss()) from failed[0]  # on a busy machine Ray notices a loss after the grace
        if failed:
            raise next(error for error in failed if not _is_lost_connection(error))
        return results[0]

    def _arrived(self, done: Sequence[Any], silence: _Silence) -> dict[int, Any]:
        """Pass on what worker 0 has sent, and return the results of the tasks that are done, by rank."""
        with self._losses():
            sent = self._ray.get(self._actors[0].take_sent.remote())
        silence.heard(anything=bool(sent))
        # Before the results: one of them may be that of a lost worker, and what was sent is taken only once.
        self.progressed |= self._watch.receive(sent)
        with self._losses():
            return {self._tasks[task]: self._ray.get(task) for task in done}

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Raise the loss of a worker as such: an actor that died, also for a lack of memory, or with its node."""
        try:
            yield
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError as error:
            raise _LostError(self._loss()) from error

    def _loss(self) -> str:
        """Say which workers were lost."""
        lost = []
        for task, rank in self._tasks.items():
            if self._ray.wait([task], timeout=0)[0]:
                try:
                    self._ray.get(task)
                except self._ray.exceptions.RayError:
                    lost.append(rank)
        named = f"worker {', '.join(map(str, lost))}" if lost else "a worker"
        return f"{named} of {len(self._tasks)} was lost"


class _Silence:
    """Says that nothing was heard of the workers for long: a message that was lost between them is no error of torch.

    Args:
        note: receives the sentence.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note, self._since, self._limit = note, time.monotonic(), _SILENT

    def heard(self, *, anything: bool) -> None:
        """Take note of a look at the workers: whether they had sent anything."""
        now = time.monotonic()
        if anything:
            self._since, self._limit = now, _SILENT
        elif now - self._since > self._limit:
            self._note(
                f"the training has made no progress for {(now - self._since) / 60:.0f} minutes; if its workers do not compute, "
                "interrupt the command and repeat it, which resumes from the last checkpoint"
            )
            self._limit *= 2


def _errors(results: dict[int, Any]) -> list[Exception]:
    return [found.error for found in results.values() if isinstance(found, FailedJob)]


def _is_lost_connection(error: Exception) -> bool:
    """Return whether an error of a worker says that it lost the connection to another one."""
    # Not ConnectionError: that of a server which the job asks is no loss of a worker.
    return isinstance(error, RuntimeError) and bool(_CONNECTION.search(str(error)))


def _processes_here(facts: Sequence[WorkerFacts]) -> list[psutil.Process]:
    """Return the workers on this machine that still run."""
    found = []
    for each in facts:
        if each.host == platform.node():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(each.pid))
    return found
