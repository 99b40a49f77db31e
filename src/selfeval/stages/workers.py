"""Compute shards on several workers, each with its own copy of the model, by Ray; and start the workers of trainings.

The driver, which is the process of the command, writes all shards; workers only compute them. A worker loads the model from
the same files and settings as the driver, and computes a shard with the number of CPU threads of the stage. Its shards are
therefore those that the driver would compute, byte for byte, on the same kind of machine.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from selfeval.backbone.load import pick_device
from selfeval.backbone.meters import peak_resident_bytes
from selfeval.backbone.roles import Backbone
from selfeval.backbone.threads import cpu_threads, usable_cores
from selfeval.config import EndpointConfig, RunConfig
from selfeval.errors import ConfigError, InputError, WorkerError
from selfeval.rollout.engines import make_engine
from selfeval.runs.reader import backbone_config
from selfeval.runs.templates import templates_of_run
from selfeval.scale.cluster import LOCAL, Cluster, joined, room, started
from selfeval.scale.failures import Failure
from selfeval.scale.pool import Needs, Pool
from selfeval.scale.training_worker import WorkerResources
from selfeval.stages.context import WorkersMemory
from selfeval.stages.evaluation_work import JudgeReplies
from selfeval.stages.parallel import ParallelTrainer, refuse_other_engine
from selfeval.stages.sent_settings import SentSettings, sent_settings
from selfeval.stages.shards import Batch, Executor, InProcess, ModelHandle, ReportProgress, ShardOutput, Work
from selfeval.stages.verdicts import JudgePairs
from selfeval.store import RunStore
from selfeval.store.remote.places import home_of

if TYPE_CHECKING:
    from selfeval.scale.worker import Compute
    from selfeval.stages.context import Context, Training
    from selfeval.stages.terminal import Terminal

__all__ = ["LOGS", "LoadModel", "Workers", "WorkersAsked", "open_workers"]

T = TypeVar("T")

LOGS = "logs"
"""Folder in a run folder with the logs of the workers."""


@dataclass(frozen=True)
class WorkersAsked:
    """The workers that the user asks for.

    Attributes:
        number: how many. Optional with `ray`; default: one per `scale.gpus` GPUs of the cluster, or else one per node.
        ray: Optional. Address of a cluster. Default: Ray is started on this machine.
    """

    number: int | None = None
    ray: str | None = None


# -- in a worker --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardResult:
    """A shard that a worker has computed.

    Attributes:
        output: its records.
        memory: peak of the worker until now, and the changes to its batch limits since its last shard.
    """

    output: ShardOutput
    memory: WorkersMemory


@dataclass(frozen=True)
class ShardTask:
    """A batch and its work, as it is sent to a worker.

    Attributes:
        threads: number of CPU threads with which it is computed, which decides the last bits of sums.
    """

    work: Any
    batch: Batch[Any]
    threads: int

    def __str__(self) -> str:
        return f"{type(self.work).__name__}: shard {self.batch.index} of {len(self.batch.records)} records"


@dataclass(frozen=True)
class LoadModel:
    """Loads the model of a round in a worker.

    Attributes:
        settings: configuration of the run, with the precision that the driver chose.
        run: folder of the run, which has the templates.
        start: Optional. Folder of the role that the round starts from.
        answers: folder of the answers of servers.
    """

    settings: SentSettings
    run: Path
    start: Path | None
    answers: Path
    trust_remote_code: bool = False

    def __call__(self) -> Compute:
        config = self.settings.receive()
        backbone = Backbone.load(config.model, config.backbone, trust_remote_code=self.trust_remote_code)
        backbone.budget.notify = logging.getLogger(__name__).info
        templates = templates_of_run(self.run, backbone.loaded.tokenizer, config.verdicts)
        engine = make_engine(config.model, config.backbone)
        engine.check(backbone)
        model = ModelHandle(backbone, templates, self.start, self.answers, engine)

        def compute(task: ShardTask, report_progress: Callable[[float], None]) -> ShardResult:
            with cpu_threads(task.threads):
                output = task.work(replace(model, report_progress=report_progress), task.batch)
            events = tuple(event.as_json() for event in backbone.budget.take_events())
            return ShardResult(output, WorkersMemory(peak_resident_bytes(), events))

        return compute


# -- in the driver ------------------------------------------------------------------------------------------------------


class Workers:
    """The workers of a run.

    Args:
        pool: the workers.
        cluster: the Ray that they run on.
        threads: number of CPU threads of each.
    """

    def __init__(self, pool: Pool, cluster: Cluster, threads: int) -> None:
        self._pool, self._cluster, self.threads = pool, cluster, threads
        self._training: Counter[str] = Counter()

    def executor(self, context: Context) -> Executor:
        """Return the executor of a stage. Workers that have no model yet load that of the round."""
        return _OnWorkers(self, context)

    def train(self, context: Context, training: Training) -> dict[str, Any]:
        """Call the training of a stage, in several workers if there are several (docs/concepts/data-parallel-training.md)."""
        self.stop()  # those that compute shards: the training needs their memory and their resources
        if self._pool.size == 1:
            return training(context)
        needs = self._pool.needs
        logs = context.first.root.resolve() / LOGS
        logs.mkdir(exist_ok=True)  # a run whose shards were finished before has none
        trainer = ParallelTrainer(
            self._pool.size,
            # The number of the stage, which run.json records and a resumed run keeps.
            WorkerResources(needs.cpus, needs.gpus, self.threads if needs.gpus else torch.get_num_threads()),
            logs,
            started=lambda processes: self._training.update(started=len(processes)),
            lost=lambda sentence: self._training.update(lost=1),
        )
        try:
            return trainer(context, training)
        finally:
            self.record(context.first)

    def map(
        self, load: LoadModel, tasks: Sequence[ShardTask], report_progress: Callable[[int, float], None]
    ) -> Iterator[tuple[int, Any]]:
        return self._pool.map(load, tasks, report_progress)

    def stop(self) -> None:
        """End the workers, which frees their memory; the next stage that needs them starts them again."""
        self._pool.stop()

    def as_json(self) -> dict[str, Any]:
        """Return the workers, and what happened to them in this process, as they are stored in run.json."""
        events = self._pool.events
        return {
            "number": self._pool.size,
            "threads": self.threads,
            "address": self._cluster.address,
            "ray": self._cluster.version,
            "started": dict(events.hosts),
            "starting": round(events.starting, 2),
            "lost": events.lost,
            "retried": events.retried,
            "repeated": events.repeated,
            "training": {"started": self._training["started"], "lost": self._training["lost"]},
        }

    def record(self, store: RunStore) -> None:
        """Write the workers to run.json, unless that fails: the error that ended a stage matters more."""
        with suppress(InputError):
            store.update_run(workers=self.as_json())


class _OnWorkers:
    """Executor of one stage."""

    def __init__(self, workers: Workers, context: Context) -> None:
        self._workers, self._store, self._add_memory = workers, context.first, context.add_workers_memory
        # Loaded here too: the driver reads prompts and limits, and trains after these stages. It also writes what the workers
        # read, the templates and the precision, and reports what is wrong with the model before any worker starts.
        model = context.model
        (context.first.root / LOGS).mkdir(exist_ok=True)
        self._here = InProcess(lambda: context.model)
        config = context.config
        backbone = backbone_config(config, context.first.run)
        is_card = backbone.device.startswith("cuda")
        # Ray shows each worker its own cards only, numbered from 0.
        backbone = backbone.model_copy(update={"device": "cuda"}) if is_card else backbone
        self._is_cpu = model.backbone.loaded.device.type == "cpu"
        if (tokens := model.backbone.budget.pass_tokens) is not None:
            backbone = backbone.model_copy(update={"pass_tokens": tokens})  # measured or recorded: results depend on it
        self._load = LoadModel(
            sent_settings(config.model_copy(update={"backbone": backbone})),
            context.first.root.resolve(),
            model.start_folder.resolve() if model.start_folder else None,
            context.answers.resolve(),
            context.trust_remote_code,
        )

    def map(
        self, work: Work[T], batches: Sequence[Batch[T]], report_progress: ReportProgress | None = None
    ) -> Iterator[tuple[Batch[T], ShardOutput]]:
        if isinstance(work, JudgePairs | JudgeReplies) and isinstance(work.config.settings, EndpointConfig):
            # It waits for the server, not for the model, and one process keeps to its budget.
            yield from self._here.map(work, batches, report_progress)
            return
        threads = torch.get_num_threads() if self._is_cpu else self._workers.threads

        def report(number: int, share: float) -> None:
            if report_progress is not None:
                report_progress(batches[number], share)

        for number, found in self._workers.map(self._load, [ShardTask(work, batch, threads) for batch in batches], report):
            if isinstance(found, Failure):
                yield batches[number], ShardOutput((), failure=found)
            else:
                self._add_memory(found.memory)
                yield batches[number], found.output

    def close(self) -> None:
        """Record the workers. They keep their models for the next stage."""
        self._workers.record(self._store)


@contextmanager
def open_workers(asked: WorkersAsked, config: RunConfig, store: RunStore, terminal: Terminal) -> Iterator[Workers]:
    """Connect to Ray while the block runs. The workers are started by the first stage that needs them.

    Args:
        asked: the workers that the user asks for.
        config: configuration of the run.
        store: folder of the run.
        terminal: shows notes.

    Raises:
        MissingPackageError: Ray is not installed.
        WorkerError: Ray cannot be started or reached, or its nodes have no room for the workers.
        ConfigError: the run is at a URL, and the cluster has several machines; or several workers would use vLLM.
    """
    logs = store.root.resolve() / LOGS
    uses_cards = pick_device(config.backbone.device).type == "cuda"
    with ExitStack() as stack:
        with terminal.waiting("starting Ray" if asked.ray is None else f"connecting to Ray at {asked.ray}"):
            cluster = stack.enter_context(_connection(asked, uses_cards=uses_cards))
        _refuse_remote_copy(store, cluster)
        plan = _sizes(asked, config, cluster, uses_cards=uses_cards)
        if plan.number > 1:
            refuse_other_engine(config)  # now rather than when the first training begins, after hours of sampling
        pool = Pool(plan.number, plan.needs, logs, slow=config.scale.slow, note=terminal.note)
        stack.callback(pool.stop)
        terminal.note(f"{plan.number} worker(s) with {plan.threads} CPU thread(s) each; logs in {logs}")
        yield Workers(pool, cluster, plan.threads)


def _refuse_remote_copy(store: RunStore, cluster: Cluster) -> None:
    """Refuse a run at a URL on several machines: its working copy is a folder of this machine.

    Raises:
        ConfigError: see above.
    """
    home = home_of(store.root)
    if home is not None and len(cluster.nodes) > 1:
        raise ConfigError(
            f"the run at {home.url} has its working copy on this machine, which the other {len(cluster.nodes) - 1} machine(s) "
            "of the cluster cannot read; use a folder on a file system that they share as --output, or workers of this machine "
            "alone (--workers N without --ray)"
        )


def _connection(asked: WorkersAsked, *, uses_cards: bool) -> AbstractContextManager[Cluster]:
    if asked.ray is not None:
        return joined(asked.ray)
    # Every worker takes one unit, so the number of workers and not that of the cores is the limit.
    return started(cpus=asked.number or 1, gpus=torch.cuda.device_count() if uses_cards else 0)


@dataclass(frozen=True)
class _Sizes:
    """Number of workers, CPU threads of each, and what Ray reserves for each."""

    number: int
    threads: int
    needs: Needs


def _sizes(asked: WorkersAsked, config: RunConfig, cluster: Cluster, *, uses_cards: bool) -> _Sizes:
    """Divide the cores and the GPUs among the workers.

    Raises:
        WorkerError: the nodes have no room for so many workers.
    """
    gpus = config.scale.gpus if uses_cards else 0
    # A head node that only coordinates has no CPUs.
    nodes = [node for node in cluster.nodes if node.get("CPU", 0.0) >= 1 and node.get("GPU", 0.0) >= gpus]
    is_local = cluster.address == LOCAL
    number = asked.number or max(1, room(nodes, 1, gpus) if gpus else len(nodes))
    threads = config.scale.threads or (max(1, usable_cores() // number) if is_local else _threads_for(number, nodes, gpus))
    cpus = 1 if is_local else threads  # a local Ray counts workers, not cores
    if room(nodes, cpus, gpus) < number:
        raise _no_room(number, Needs(cpus, gpus), room(nodes, cpus, gpus))
    return _Sizes(number, threads, Needs(cpus, gpus))


def _threads_for(number: int, nodes: Sequence[Mapping[str, float]], gpus: int) -> int:
    """Return the largest number of CPUs per worker with which the nodes hold all workers; 1 if they never do."""
    most = int(max((node["CPU"] for node in nodes), default=1))
    return next((cpus for cpus in range(most, 0, -1) if room(nodes, cpus, gpus) >= number), 1)


def _no_room(number: int, needs: Needs, most: int) -> WorkerError:
    with_gpus = f" and {needs.gpus} GPU(s)" if needs.gpus else ""
    fewer = f"use --workers {most}, " if most else ""
    on_cpu = ", or set backbone.device=cpu" if needs.gpus else ""
    return WorkerError(
        f"{number} workers with {needs.cpus} CPU(s){with_gpus} each are more than the {most} for which the nodes have room; "
        f"{fewer}lower {'scale.gpus or ' if needs.gpus else ''}scale.threads{on_cpu}"
    )
