from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from other_process import OtherProcess
from selfeval.records import Drop, Question, Seed, Split
from selfeval.stages import terminal as terminal_module
from selfeval.stages.context import Context
from selfeval.stages.running import execute, new_config
from selfeval.stages.shards import (
    Batch,
    InProcess,
    ModelHandle,
    ReportProgress,
    ShardOutput,
    StageShards,
    Work,
    grow_shards,
    map_shards,
)
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore

SIZES = (
    "questions.train=8",
    "questions.test=4",
    "questions.shard=12",
    "replies.per_question=2",
    "replies.shard=5",
    "replies.beams=2",
    "replies.beam_share=0.5",
    "verdicts.shard=5",
)


def _shards(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("shard-*.jsonl"))}


@pytest.mark.slow
def test_the_work_of_each_stage_is_the_same_in_another_process(tmp_path: Path) -> None:
    config, made = new_config(assignments=SIZES), list[OtherProcess]()

    def executor_of(context: Context) -> OtherProcess:
        made.append(OtherProcess(config, context.store.root))
        return made[-1]

    execute(config, tmp_path / "here", (1, "verdicts"), Terminal(quiet=True))
    execute(config, tmp_path / "there", (1, "verdicts"), Terminal(quiet=True), executor_of=executor_of)
    here = _shards(tmp_path / "here")
    assert _shards(tmp_path / "there") == here
    pids = [pid for other in made for pid in other.pids]
    assert len(pids) == len(set(pids)) == 3, "one process for each stage, ended with it"
    assert os.getpid() not in pids
    assert all(other.closed for other in made)
    assert {name.split("/")[0] for name in here} == {"questions", "replies", "reference_answers", "verdicts", "dropped"}
    assert len([name for name in here if name.startswith("replies/")]) == 3


# -- the shard loop -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Echo:
    """Work that returns its records in capitals, and fails at one shard."""

    fails: int = -1

    def __call__(self, model: ModelHandle, batch: Batch[Seed]) -> ShardOutput:
        if batch.index == self.fails:
            raise RuntimeError("out of memory")
        return ShardOutput([Seed(seed.question.upper()) for seed in batch.records], [Drop("echo", "short", "x")])


@dataclasses.dataclass(frozen=True)
class Count:
    """Work that returns two records that say how many there were before."""

    def __call__(self, model: ModelHandle, batch: Batch[Seed]) -> ShardOutput:
        return ShardOutput([Seed(f"{len(batch.records)}")] * 2)


ITEMS = [Seed(letter) for letter in "abcde"]


def _executor(calls: list[int]) -> InProcess:
    def model() -> ModelHandle:
        calls.append(1)
        return ModelHandle(cast(Any, None), cast(Any, None))

    return InProcess(model)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "run")
    yield store
    store.close()


def test_each_shard_is_written_as_soon_as_it_is_finished_and_never_computed_twice(store: RunStore) -> None:
    stage, calls = StageShards(store, Terminal(quiet=True), "echo", drops=True), list[int]()
    with pytest.raises(RuntimeError, match="out of memory"):
        map_shards(stage, ITEMS, 2, Echo(fails=2), _executor(calls))
    assert [path.name for path in store.shards("echo")] == ["shard-00000.jsonl", "shard-00001.jsonl"]
    calls.clear()
    map_shards(stage, ITEMS, 2, Echo(), _executor(calls))
    assert len(calls) == 1
    assert [seed.question for seed in store.read("echo", Seed)] == list("ABCDE")
    assert len(store.read_dropped("echo")) == 3
    map_shards(stage, ITEMS, 2, Echo(fails=0), _executor(calls))
    assert len(calls) == 1, "no model is loaded if every shard is finished"


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """Work that fails at one shard, the first times that it is tried there."""

    times: int
    tried: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, model: ModelHandle, batch: Batch[Question]) -> ShardOutput:
        self.tried.append(batch.index)
        if batch.index == 1 and self.tried.count(1) <= self.times:
            raise ZeroDivisionError("of shard 1")
        return ShardOutput([Seed(question.text) for question in batch.records], [], {"more": [Seed("m")]})


QUESTIONS = [Question(f"q{n}", f"text {n}", Split.TRAIN, "self") for n in range(5)]


def test_a_shard_that_fails_is_tried_four_times(store: RunStore) -> None:
    stage, work = StageShards(store, Terminal(quiet=True), "echo", drops=True, others=("more",)), Poisoned(3)
    map_shards(stage, QUESTIONS, 2, work, _executor([]))
    assert work.tried == [0, 1, 1, 1, 1, 2]
    assert len(store.read("echo", Seed)) == 5
    assert store.read_dropped("echo") == []


def test_a_poisoned_shard_stops_the_stage_and_is_listed(store: RunStore) -> None:
    stage, work = StageShards(store, Terminal(quiet=True), "echo", drops=True, others=("more",)), Poisoned(4)
    with pytest.raises(ZeroDivisionError, match="of shard 1") as failure:
        map_shards(stage, QUESTIONS, 2, work, _executor([]))
    assert failure.value.__notes__ == ["echo: shard 1 failed 4 times"]
    assert work.tried == [0, 1, 1, 1, 1]
    (drop,) = store.read_dropped("echo")
    assert (drop.reason, drop.text, drop.detail["questions"]) == ("poisoned", "ZeroDivisionError: of shard 1", ["q2", "q3"])
    assert 'raise ZeroDivisionError("of shard 1")' in drop.detail["traceback"]
    # The same command tries it again, and its success removes the drop.
    map_shards(stage, QUESTIONS, 2, Poisoned(0), _executor([]))
    assert len(store.read("echo", Seed)) == 5
    assert store.read_dropped("echo") == []


def test_a_poisoned_shard_can_be_skipped(store: RunStore) -> None:
    said = io.StringIO()
    terminal = Terminal(console=Console(file=said, width=200))
    stage, work = StageShards(store, terminal, "echo", drops=True, others=("more",), poisoned="skip"), Poisoned(9)
    map_shards(stage, QUESTIONS, 2, work, _executor([]))
    assert work.tried == [0, 1, 1, 1, 1, 2]
    assert [seed.question for seed in store.read("echo", Seed)] == ["text 0", "text 1", "text 4"]
    assert len(store.read("more", Seed)) == 2
    assert [drop.reason for drop in store.read_dropped("echo")] == ["poisoned"]
    assert "echo: shard 1 is skipped, because it failed 4 times" in said.getvalue()
    map_shards(stage, QUESTIONS, 2, work, _executor([]))
    assert len(work.tried) == 6, "a resumed run does not try it again"


def test_growing_shards_read_all_records_before_them_and_stop_at_what_is_wanted(store: RunStore) -> None:
    stage, calls = StageShards(store, Terminal(quiet=True), "count"), list[int]()

    def grow(wanted: int, most: int) -> list[str]:
        return [seed.question for seed in grow_shards(stage, Seed, Count(), _executor(calls), wanted=wanted, most=most)]

    assert grow(wanted=3, most=9) == ["0", "0", "2", "2"]
    assert grow(wanted=9, most=3) == ["0", "0", "2", "2", "4", "4"]
    assert len(calls) == 3


# -- progress within a shard --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Half:
    """Work that tells that half of it is done."""

    def __call__(self, model: ModelHandle, batch: Batch[Seed]) -> ShardOutput:
        model.report_progress(0.5)
        return ShardOutput([Seed("x")] * 3)


def _every_line(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, io.StringIO]:
    """A terminal that prints a line whenever there is news."""
    monkeypatch.setattr(terminal_module, "_PLAIN_SECONDS", -1.0)
    text = io.StringIO()
    return Terminal(console=Console(file=text, width=200)), text


def _counts(text: io.StringIO, stage: str) -> list[str]:
    """The counts that were shown, without repetitions."""
    shown = [found[1] for line in text.getvalue().splitlines() if (found := re.match(rf"{stage}: (\d+/\d+),", line))]
    return list(dict.fromkeys(shown))


def test_a_bar_moves_within_a_shard(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, text = _every_line(monkeypatch)
    map_shards(StageShards(store, terminal, "half"), ITEMS, 4, Half(), _executor([]))
    assert _counts(text, "half") == ["2/5", "4/5", "5/5"]
    grow_shards(StageShards(store, terminal, "grown"), Seed, Half(), _executor([]), wanted=6, most=2)
    # Half of the six that are missing; three are there; half of the three that are still missing.
    assert _counts(text, "grown") == ["3/6", "4/6", "6/6"]


def test_a_bar_adds_up_what_is_done_of_several_shards_in_progress(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(InProcess):
        def map(self, work: Work[Any], batches: Sequence[Batch[Any]], report_progress: ReportProgress | None = None) -> Any:
            assert report_progress
            for batch in batches:
                report_progress(batch, 0.5)
            yield from super().map(work, batches)

    terminal, text = _every_line(monkeypatch)
    map_shards(StageShards(store, terminal, "half"), ITEMS[:4], 2, Half(), AtOnce(_executor([]).model))
    # Half of 2, half of 2 and 2, then 2 and half of 2
    assert _counts(text, "half") == ["1/4", "2/4", "3/4", "4/4"]


def test_every_stage_that_samples_shows_progress_within_its_only_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, text = _every_line(monkeypatch)
    sizes = ("questions.train=8", "questions.test=4", "replies.per_question=2", "verdicts.calibration.method=off")
    execute(new_config(assignments=sizes), tmp_path / "run", (1, "verdicts"), terminal, verbose=True)
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"log: {tmp_path}/run/run.log" in text.getvalue()
    for stage in ("questions", "replies", "verdicts"):
        counts = _counts(text, stage)
        assert len(counts) >= 5, text.getvalue()
        assert counts == sorted(counts, key=lambda count: int(count.split("/")[0])), "never back"
        assert len(list((tmp_path / "run" / stage).glob("shard-*"))) == 1
        assert re.search(rf"INFO selfeval\.stages\.terminal: {stage}: \d+\.\d s  \(", log), "the end of the stage"
