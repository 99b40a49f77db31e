"""Map a stage's work over shards: skip finished ones, compute the others, and write each as soon as it is finished.

The work of a stage is a pure function of the model and a batch of records. It has no access to the run folder and is
picklable, so an executor may call it in another process. Random draws are derived from seeds and names (`Draws`), so the
results do not depend on which process computes a shard, or in which order.

One rule for work that fails, in every executor: an error that the user has to correct ends the stage; any other is retried
three times (`selfeval.scale.failures`). A shard that still fails is listed in `dropped/` with its traceback. Then the stage
stops, or, with `scale.poisoned = "skip"`, continues without its records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import load_role
from selfeval.backbone.roles import Backbone
from selfeval.judging.templates import Templates
from selfeval.quality.vector_groups import VectorGroups
from selfeval.records import Drop, Question
from selfeval.rollout.engines import OwnEngine, RolloutEngine
from selfeval.scale.failures import Failure, retried
from selfeval.stages.terminal import Bar, Terminal
from selfeval.store import RunStore

__all__ = [
    "POISONED",
    "START",
    "Batch",
    "Executor",
    "InProcess",
    "ModelHandle",
    "ReportProgress",
    "ShardOutput",
    "StageShards",
    "Work",
    "computed",
    "counting",
    "grow_shards",
    "map_shards",
]

T = TypeVar("T")

ReportProgress = Callable[["Batch[Any]", float], None]
"""Receives the share of a batch that is done, from 0 to 1."""

START = "start"
"""Role that a later round starts from: the previous round's policy, frozen. Round 1 starts from the bare base."""


POISONED = "poisoned"
"""Reason of the drop that stands for a shard whose work failed every time."""


# -- work ---------------------------------------------------------------------------------------------------------------


def _ignore(share: float) -> None:
    """Receive the share of a batch that is done where nobody shows it."""


@dataclass(frozen=True)
class ModelHandle:
    """The model of a run in one process. It is loaded once per process and stays there.

    Attributes:
        backbone: the base and its roles.
        templates: the prompt templates of the run.
        start_folder: Optional. Saved role that the round starts from. Default: none, the round starts from the bare base.
        answers: Optional. Folder of the answers of a judge's server. Default: none, so no server may be asked.
        engine: samples the replies. Default: the engine on the backbone's own weights.
        report_progress: receives the share of the batch that is done so far, from 0 to 1. Default: does nothing.
        vectors: vectors of earlier texts, for stages that compare texts by meaning. Default: none so far.
    """

    backbone: Backbone
    templates: Templates
    start_folder: Path | None = None
    answers: Path | None = None
    engine: RolloutEngine = field(default_factory=OwnEngine)
    report_progress: Callable[[float], None] = _ignore
    vectors: VectorGroups = field(default_factory=VectorGroups)

    def start(self) -> str:
        """Load the role that the round starts from if needed, and return its name."""
        if self.start_folder is None:
            return BASE
        # The first work that needs it loads it; afterwards it stays on the backbone.
        if START not in self.backbone.roles.names:
            load_role(self.backbone, START, self.start_folder)
        return START


@dataclass(frozen=True)
class Batch(Generic[T]):
    """The records from which a shard is computed.

    Attributes:
        index: number of the shard, from which its random seeds are derived.
        records: the records.
    """

    index: int
    records: Sequence[T]


@dataclass(frozen=True)
class ShardOutput:
    """The records of a finished shard.

    Attributes:
        records: records of the stage.
        drops: dropped records with their reasons; None if the stage never drops records.
        others: records for shards of the same number in other folders, by folder.
        failure: why there are no records: the work failed every time. Default: it did not.
    """

    records: Sequence[Any]
    drops: Sequence[Drop] | None = None
    others: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    failure: Failure | None = None


class Work(Protocol[T]):
    """The work of a stage: a frozen dataclass of plain settings, callable and picklable."""

    def __call__(self, model: ModelHandle, batch: Batch[T]) -> ShardOutput:
        """Compute one shard. The result depends only on the settings, the model and the batch."""


class Executor(Protocol):
    """Calls the work, in this process or elsewhere."""

    def map(
        self, work: Work[T], batches: Sequence[Batch[T]], report_progress: ReportProgress | None = None
    ) -> Iterator[tuple[Batch[T], ShardOutput]]:
        """Yield each batch with its result as soon as it is finished, in any order.

        Work that raises is retried, except for an `InputError`, which is raised; see `selfeval.scale.failures`.

        Args:
            work: computes a batch.
            batches: the batches.
            report_progress: Optional. May be called with the share of a batch that is done so far. Default: does nothing.
        """

    def close(self) -> None:
        """Release everything that it started. Called at the end of the stage, also of one that failed."""


@dataclass(frozen=True)
class InProcess:
    """Executor that computes one batch after another in this process.

    Attributes:
        model: returns the model; called when the first batch is computed.
    """

    model: Callable[[], ModelHandle]

    def map(
        self, work: Work[T], batches: Sequence[Batch[T]], report_progress: ReportProgress | None = None
    ) -> Iterator[tuple[Batch[T], ShardOutput]]:
        for batch in batches:
            model = self.model()
            if report_progress is not None:
                model = replace(model, report_progress=partial(report_progress, batch))
            found = retried(partial(work, model, batch))
            yield batch, ShardOutput((), failure=found) if isinstance(found, Failure) else found

    def close(self) -> None:
        """Do nothing: the model stays loaded for the next stages."""


def counting(report_progress: Callable[[float], None], total: int) -> Callable[[int], None]:
    """Return a callback that counts finished pieces, such as replies, and reports which share of `total` they are.

    Example:
        >>> advance = counting(print, 4)
        >>> advance(1), advance(2)
        0.25
        0.75
        (None, None)
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report_progress(min(1.0, done / max(total, 1)))

    return advance


def computed(
    executor: Executor, work: Work[T], batches: Sequence[Batch[T]], bar: Bar, weight: int = 1
) -> Iterator[tuple[Batch[T], ShardOutput]]:
    """Yield each batch with its result, and move the bar by its records, as they are done.

    Args:
        executor: calls the work.
        work: computes a batch.
        batches: the batches.
        bar: shows progress.
        weight: Optional. Units of the bar for each record. Default: 1.

    Raises:
        Exception: the work failed every time on a batch. The rest of the stage depends on these batches, so none is skipped.
    """
    for batch, output in _outputs(executor, work, batches, bar, weight):
        if output.failure is not None:
            raise _error_of(output.failure, f"batch {batch.index}")
        yield batch, output


def _outputs(
    executor: Executor, work: Work[T], batches: Sequence[Batch[T]], bar: Bar, weight: int = 1
) -> Iterator[tuple[Batch[T], ShardOutput]]:
    """Yield each batch with its result or failure, and move the bar."""
    shares: dict[int, float] = {}  # of the batches in progress; an executor may compute several

    def report_progress(batch: Batch[T], share: float) -> None:
        shares[batch.index] = share * len(batch.records) * weight
        bar.within(sum(shares.values()))

    for batch, output in executor.map(work, batches, report_progress):
        yield batch, output
        shares.pop(batch.index, None)
        bar.advance(len(batch.records) * weight, sum(shares.values()))


def _error_of(failure: Failure, what: str) -> Exception:
    """Return the error of a failure, with the number of attempts, and the traceback of a worker."""
    error = failure.error
    error.add_note(f"{what} failed {failure.attempts} times")
    if error.__traceback__ is None:
        error.add_note(failure.traceback)
    return error


# -- shards -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageShards:
    """The shards of one stage in the run folder.

    Attributes:
        store: folder of the round.
        terminal: shows progress.
        name: name of the stage.
        drops: whether the stage drops records; None if shards of earlier versions have no file of drops. Default: False.
        others: other folders in which the stage writes a shard of the same number. Default: none.
        title: Optional. Name on the progress bar. Default: the name of the stage.
        poisoned: what to do with a shard whose work fails every time: `stop` the stage, or `skip` the shard.
    """

    store: RunStore
    terminal: Terminal
    name: str
    drops: bool | None = False
    others: tuple[str, ...] = ()
    title: str = ""
    poisoned: Literal["stop", "skip"] = "stop"

    def has(self, index: int) -> bool:
        """Return whether a shard is finished, with its shards in other folders."""
        # The stage's own shard last; see `write`.
        others = all(self.store.has_shard(folder, index) for folder in self.others)
        return others and self.store.has_shard(self.name, index, drops=self.drops)

    def write(self, index: int, output: ShardOutput) -> None:
        """Write a shard after its shards in other folders, because `has` looks at the stage's own shard last."""
        for folder in self.others:
            self.store.write_shard(folder, index, output.others[folder])
        self.store.write_shard(self.name, index, output.records, output.drops)

    def settle(self, index: int, output: ShardOutput, questions: Sequence[str] = ()) -> None:
        """Write a finished shard, or act on a failure.

        Args:
            index: number of the shard.
            output: its records, or its failure.
            questions: ids of its questions, which are listed with a failure. Default: none.

        Raises:
            Exception: the error of the failure, unless such shards are skipped.
        """
        if output.failure is None:
            self.write(index, output)
            return
        drop = _poisoned_drop(self.name, index, output.failure, questions)
        if self.poisoned == "skip":
            # Without records the shard counts as finished, so a resumed run does not try it again.
            self.write(index, ShardOutput((), [drop], dict.fromkeys(self.others, ())))
            self.terminal.note(f"{self.name}: shard {index} is skipped, because it failed {output.failure.attempts} times")
            return
        if self.drops is not False:
            self.store.write_dropped(self.name, index, [drop])
        raise _error_of(output.failure, f"{self.name}: shard {index}")


def _poisoned_drop(stage: str, index: int, failure: Failure, questions: Sequence[str]) -> Drop:
    detail = {
        "shard": index,
        "attempts": failure.attempts,
        "questions": list(questions),
        "traceback": failure.traceback,
    }
    return Drop(stage, POISONED, f"{type(failure.error).__name__}: {failure.error}", detail)


def _question_ids(records: Sequence[Any]) -> list[str]:
    """Return the ids of the questions of a batch, whose records are questions, or contain one."""
    found = [record[0] if isinstance(record, tuple) else getattr(record, "question", record) for record in records]
    return [question.id for question in found if isinstance(question, Question)]


def map_shards(stage: StageShards, items: Sequence[T], size: int, work: Work[T], executor: Executor) -> None:
    """Split the items into shards of `size`, and compute those that are not finished. The shards are independent."""
    batches = [Batch(number, items[first : first + size]) for number, first in enumerate(range(0, len(items), size))]
    # Batches are numbered before the finished ones are left out, so their seeds do not depend on a resume.
    left = [batch for batch in batches if not stage.has(batch.index)]
    done = len(items) - sum(len(batch.records) for batch in left)
    with stage.terminal.bar(stage.title or stage.name, len(items), done) as bar:
        for batch, output in _outputs(executor, work, left, bar):
            stage.settle(batch.index, output, _question_ids(batch.records))


def grow_shards(stage: StageShards, kind: type[T], work: Work[T], executor: Executor, *, wanted: int, most: int) -> list[T]:
    """Compute one shard after another, each from the records of all shards before it, until there are enough.

    Args:
        stage: the stage.
        kind: class of its records.
        work: computes a shard from all records so far; the share that it reports is that of the records that are missing.
        executor: calls the work.
        wanted: number of records.
        most: maximum number of shards.

    Returns:
        All records, including those of shards that were already finished.
    """
    records: list[T] = []
    index = 0
    # Up to the first gap: a shard depends on all before it, so those after a gap are computed again.
    while stage.has(index):
        records += stage.store.read_shard(stage.name, index, kind)
        index += 1
    with stage.terminal.bar(stage.name, wanted, len(records)) as bar:
        while len(records) < wanted and index < most:
            report_progress = partial(_within_missing, bar, wanted - len(records))
            # One batch at a time, because the next one reads these records.
            for batch, output in executor.map(work, [Batch(index, tuple(records))], report_progress):
                stage.settle(batch.index, output)
                records += output.records
                bar.advance(len(output.records))
            index += 1
    return records


def _within_missing(bar: Bar, missing: int, batch: Batch[Any], share: float) -> None:
    """Move the bar by a share of the missing records."""
    bar.within(share * missing)
