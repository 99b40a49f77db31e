"""The training of a stage on workers: what the process of the command shows, records and allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from selfeval.backbone.budget import EventKind, MemoryBudget, MemoryEvent, Phase
from selfeval.backbone.process_group import SINGLE_PROCESS
from selfeval.config import RunConfig
from selfeval.errors import LoopError
from selfeval.stages import parallel
from selfeval.stages.context import Context, WorkersMemory
from selfeval.stages.parallel import ParallelTrainer, RelayedTerminal, StageJob, _memory_of, _Shown
from selfeval.stages.terminal import Bar, Terminal
from selfeval.store import RUN_SCHEMA, RunStore
from selfeval.store.fence import FENCE


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    store = RunStore(tmp_path / "run")
    store.update_run(schema=RUN_SCHEMA)
    yield Context(RunConfig(), store, Terminal(quiet=True))
    store.close()


def _train(context: Context) -> dict[str, Any]:
    context.log("policy", {"step": 1})
    return {"iterations": 1}


def _fail(context: Context) -> dict[str, Any]:
    raise LoopError("no pair survived")


def _here(tokens: list[str]) -> Callable[..., Any]:
    """Return a stand-in for the workers: it loses the first attempt after its start, and does the second one here."""

    def train(job: StageJob, workers: int, resources: Any, *, watch: Any, renewed: Any, **_: Any) -> Any:
        for _ in range(2):
            job = renewed(job)
            tokens.append(job.token)
        return job(SINGLE_PROCESS, lambda sent: None)

    return train


def test_each_attempt_has_another_token_and_none_is_left(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list[str]()
    monkeypatch.setattr(parallel, "train_on_workers", _here(tokens))
    assert ParallelTrainer(2)(context, _train) == {"iterations": 1}
    assert len(set(tokens)) == 2
    assert context.store.read_metrics("policy") == [{"step": 1}]
    assert not (context.store.root / FENCE).exists()
    with pytest.raises(LoopError):
        ParallelTrainer(2)(context, _fail)
    assert not (context.store.root / FENCE).exists()


def test_peak_and_memory_events_of_the_workers_are_those_of_the_stage(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "train_on_workers", _here([]))
    own = context.peak_bytes()
    ParallelTrainer(2)(context, _train)
    memory = context.workers_memory
    assert memory is not None
    assert memory.peak_bytes >= own > 2**20
    event = {"phase": "update", "kind": "out_of_memory", "unit": "tokens", "from": 8, "to": 4, "free_bytes": 1, "times": 3}
    context.workers_memory = WorkersMemory(7 * 2**40, (event,))
    assert context.peak_bytes() == 7 * 2**40
    assert context.take_memory_events() == [event]
    assert context.take_memory_events() == [], "those of one stage are not those of the next"
    assert context.peak_bytes() < 7 * 2**40


@dataclass
class _Three:
    """Three processes, of which the other two send what is given."""

    others: Sequence[Any]
    rank: int = 0
    size: int = 3

    def gather(self, value: Any) -> list[Any]:
        work, _, error = value
        return [value, *((work, other, error) for other in self.others)]


@dataclass
class _Loaded:
    budget: MemoryBudget = field(default_factory=MemoryBudget)


def test_equal_events_of_workers_are_one(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    event = MemoryEvent(Phase.UPDATE, EventKind.OUT_OF_MEMORY, 8, 4, 100, times=2)
    other = MemoryEvent(Phase.SCORE, EventKind.GROWN, 8, 16, 100)
    monkeypatch.setattr(context, "take_memory_events", lambda: [event.as_json()])
    found = _memory_of(_Three([(2**50, [event.as_json(), other.as_json()]), (5, [])]), context)  # type: ignore[arg-type]
    assert found.peak_bytes == 2**50
    assert found.events == ({**event.as_json(), "times": 4}, other.as_json())


# -- progress -----------------------------------------------------------------------------------------------------------


class _Recorded(Terminal):
    """A terminal that records what it shows."""

    def __init__(self) -> None:
        super().__init__(quiet=True, asks=False)
        self.shown = list[Any]()

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        self.shown.append(("bar", name, total, done))
        yield _RecordedBar(self, name, total, done)
        self.shown.append("end")

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        self.shown.append(("waiting", what))
        yield
        self.shown.append("end")

    def note(self, text: str) -> None:
        self.shown.append(("note", text))


class _RecordedBar(Bar):
    def within(self, units: float) -> None:
        assert isinstance(self._terminal, _Recorded)
        self._terminal.shown.append((self.name, self.done, units))


def test_the_progress_of_worker_0_is_shown_and_a_repeated_step_is_no_progress() -> None:
    terminal, events = _Recorded(), list[Any]()
    shown, relayed = _Shown(terminal), RelayedTerminal(events.append)
    with relayed.waiting("loading"):
        pass
    with relayed.bar("policy", 3) as bar:
        bar.advance()
        assert shown.receive(events)
        assert not shown.receive([])
        # The worker is lost: the bar ends, and the next one repeats the first step.
        shown.restart("worker 1 of 2 was lost")
        events.clear()
    events.clear()
    with relayed.bar("policy", 3) as bar:
        bar.advance()
        assert not shown.receive(events), "only a step that was never reached before counts"
        events.clear()
        bar.advance()
    assert shown.receive(events)
    notes = [("note", "worker 1 of 2 was lost")]
    first = [("waiting", "loading"), "end", ("bar", "policy", 3, 0), ("policy", 1, 0.0), "end"]
    assert terminal.shown == [*first, *notes, ("bar", "policy", 3, 0), ("policy", 1, 0.0), ("policy", 2, 0.0), "end"]
