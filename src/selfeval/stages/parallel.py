"""Training of a stage on several workers: each opens the run folder, and worker 0 alone writes to it.

The workers have the whole context of the stage and call the same training as one process does. See
docs/concepts/data-parallel-training.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, cast

from selfeval.backbone.meters import peak_resident_bytes
from selfeval.backbone.process_group import ProcessGroup, gather_outcomes
from selfeval.config import RunConfig
from selfeval.errors import ConfigError
from selfeval.records import Label
from selfeval.scale.training import Watch, train_on_workers
from selfeval.scale.training_worker import Job, WorkerResources
from selfeval.stages.context import Context, Training, WorkersMemory
from selfeval.stages.sent_settings import SentSettings, sent_settings
from selfeval.stages.terminal import Bar, Terminal
from selfeval.store import JoinedStore, admit_writer, dismiss_writer

__all__ = ["ParallelTrainer", "RelayedTerminal", "StageJob", "refuse_other_engine"]

Event = tuple[Any, ...]


@dataclass(frozen=True)
class ParallelTrainer:
    """A trainer (`Context.trainer`) that calls the training on workers of Ray, which has to be connected.

    Attributes:
        workers: number of workers.
        resources: resources of each.
        logs: Optional. Folder for the logs of the workers.
        started: called with the process ids of the workers, whenever they have started.
        lost: called with a sentence after a worker was lost, which the terminal shows too.
    """

    workers: int
    resources: WorkerResources = field(default_factory=WorkerResources)
    logs: Path | None = None
    started: Callable[[Sequence[int]], None] = lambda processes: None
    lost: Callable[[str], None] = lambda sentence: None

    def __call__(self, context: Context, training: Training) -> dict[str, Any]:
        refuse_other_engine(context.config)
        # The workers need the memory. A later stage of this process loads the base again.
        context.release()
        root, shown = context.store.root.resolve(), _Shown(context.terminal)

        def lost(sentence: str) -> None:
            shown.restart(sentence)
            self.lost(sentence)

        def renewed(job: Job) -> Job:
            # Worker 0 of an earlier attempt may live on for a moment, and loses its right to write.
            return replace(cast(StageJob, job), token=admit_writer(root))

        watch = Watch(shown.receive, lost, self.started, context.terminal.note)
        try:
            with shown.stack:
                counts, memory = train_on_workers(
                    _job_of(context, training), self.workers, self.resources, logs=self.logs, watch=watch, renewed=renewed
                )
            context.add_workers_memory(memory)
        finally:
            dismiss_writer(root)
        return cast(dict[str, Any], counts)


def _job_of(context: Context, training: Training) -> StageJob:
    return StageJob(
        sent_settings(context.config),
        context.store.root.resolve(),
        tuple(store.root.resolve() for store in context.earlier),
        training,
        trust_remote_code=context.trust_remote_code,
        allow_code_execution=context.allow_code_execution,
        force=context.force,
        labels=tuple(context.labels),
    )


def refuse_other_engine(config: RunConfig) -> None:
    """Refuse an engine that does not divide its requests among the workers.

    Raises:
        ConfigError: the engine is vLLM.
    """
    if config.backbone.engine != "own":
        raise ConfigError(
            f"backbone.engine = {config.backbone.engine} cannot be used in a training on several workers, each of which would "
            'sample all replies; set backbone.engine = "own", or use one worker or none'
        )


@dataclass(frozen=True)
class StageJob:
    """The training of a stage in a worker; the fields are those of `Context`.

    Attributes:
        settings: the configuration.
        root: folder of the round, which all workers can read.
        earlier: folders of the previous rounds.
        training: trains and saves the roles.
        token: right of worker 0 to write to the folder (`admit_writer`).
    """

    settings: SentSettings
    root: Path
    earlier: tuple[Path, ...]
    training: Training
    trust_remote_code: bool
    allow_code_execution: bool
    force: bool
    labels: tuple[Label, ...]
    token: str = ""

    def __call__(self, processes: ProcessGroup, send: Callable[[Any], None]) -> tuple[dict[str, Any], WorkersMemory]:
        context = self._context(processes, send)
        try:
            counts = self.training(context)
            return counts, _memory_of(processes, context)
        finally:
            context.trackers.close()
            context.release()

    def _context(self, processes: ProcessGroup, send: Callable[[Any], None]) -> Context:
        writes = processes.rank == 0
        return Context(
            self.settings.receive(),
            JoinedStore(self.root, self.token if writes else None),
            RelayedTerminal(send) if writes else Terminal(quiet=True, asks=False),
            earlier=[JoinedStore(folder) for folder in self.earlier],
            trust_remote_code=self.trust_remote_code,
            allow_code_execution=self.allow_code_execution,
            force=self.force,
            labels=self.labels,
            processes=processes,
        )


def _memory_of(processes: ProcessGroup, context: Context) -> WorkersMemory:
    """Return the largest peak and all events of the workers."""
    found = (peak_resident_bytes(), context.take_memory_events())
    everywhere = gather_outcomes(processes, "memory of the training", found, None)
    return reduce(or_, (WorkersMemory(peak, tuple(events)) for peak, events in everywhere))


# -- progress -----------------------------------------------------------------------------------------------------------


class RelayedTerminal(Terminal):
    """The terminal of worker 0: everything is sent to the process that started the workers.

    Args:
        send: takes an event, which `_Shown.receive` understands.
    """

    def __init__(self, send: Callable[[Event], None]) -> None:
        super().__init__(quiet=True, asks=False)
        self._send = send

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        self._send(("bar", name, total, done))
        yield _RelayedBar(self, self._send, name, total, done)
        self._send(("end",))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        self._send(("waiting", what))
        yield
        self._send(("end",))

    def show(self, text: str) -> None:
        self._send(("show", text))

    def note(self, text: str) -> None:
        self._send(("note", text))


class _RelayedBar(Bar):
    def __init__(self, terminal: Terminal, send: Callable[[Event], None], name: str, total: int, done: int) -> None:
        super().__init__(terminal, name, total, done)
        self._send = send

    def within(self, units: float) -> None:
        self._send(("reached", self.done, units))

    def say(self, figures: str) -> None:
        self._send(("say", figures))


class _Shown:
    """Shows the events of worker 0 on a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal, self.stack = terminal, ExitStack()
        self._open: list[tuple[ExitStack, Bar | None]] = []
        self._furthest: dict[str, int] = {}

    def receive(self, events: Sequence[Event]) -> bool:
        """Show events in order. Return whether a bar got further than ever before, also by workers that were lost."""
        before = dict(self._furthest)
        for name, *values in events:
            if name in ("note", "show"):
                getattr(self._terminal, name)(*values)
            elif name in ("bar", "waiting"):
                self._begin(name, values)
            elif name == "end":
                self._open.pop()[0].close()
            else:
                self._move(name, values)
        return self._furthest != before

    def _begin(self, name: str, values: Sequence[Any]) -> None:
        one = self.stack.enter_context(ExitStack())
        shown = one.enter_context(getattr(self._terminal, name)(*values))
        self._open.append((one, shown if name == "bar" else None))

    def _move(self, name: str, values: Sequence[Any]) -> None:
        bar = next(bar for _, bar in reversed(self._open) if bar is not None)
        if name == "say":
            bar.say(*values)
        else:
            bar.done, units = values
            bar.within(units)
            self._furthest[bar.name] = max(bar.done, self._furthest.get(bar.name, bar.done))

    def restart(self, sentence: str) -> None:
        """End what the lost workers were doing, and say what happened."""
        while self._open:
            self._open.pop()[0].close()
        self._terminal.note(sentence)
