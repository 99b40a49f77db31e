"""Measure a judge on a data set of labelled pairs: `selfeval benchmark-judge`.

Results are written shard by shard to an output folder, so the same command resumes after a kill.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from selfeval import __version__
from selfeval.errors import DataError, InputError, RunFolderError
from selfeval.judge_benchmark.figures import Case, Measured, measure
from selfeval.judge_benchmark.formats import read_data
from selfeval.judge_benchmark.judging import SHARD, JudgeLabelled, Outcome
from selfeval.judge_benchmark.pairs import LabelledPair, sampled
from selfeval.judge_benchmark.subject import Subject, subject_of
from selfeval.judging.server.cache import ANSWERS
from selfeval.runs.templates import day_of
from selfeval.stages.shards import InProcess, ModelHandle, StageShards, map_shards
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, fingerprint
from selfeval.store.remote.places import local_run

__all__ = ["JudgeBenchmark", "benchmark_judge", "judge_pairs", "loaded_once", "refuse_server_of_run", "results_store"]

_STAGE = "judgements"
_FILE = "benchmark.json"


@dataclass(frozen=True)
class JudgeBenchmark:
    """The result of `benchmark_judge`.

    Attributes:
        data: name of the data set, or the path of the file.
        judge: role, judge, model, run and settings of the verdicts.
        seed: seed of the sample.
        available: number of pairs in the data set with a label of the majority.
        undecided: number of pairs that are left out because their annotators have no majority.
        measured: the figures.
    """

    data: str
    judge: dict[str, Any]
    seed: int
    available: int
    undecided: int
    measured: Measured

    def as_json(self) -> dict[str, Any]:
        """Return everything in the form of report.json; figures are objects of `value`, `ci_low`, `ci_high` and `n`."""
        return {
            "data": self.data,
            "judge": self.judge,
            "seed": self.seed,
            "available": self.available,
            "undecided": self.undecided,
            **self.measured.as_json(),
            "version": __version__,
        }


def benchmark_judge(
    data: str | Path,
    *,
    run: str | Path | None = None,
    model: str | None = None,
    judge: str | None = None,
    files: Sequence[str | Path] = (),
    settings: Sequence[str] = (),
    sure: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> JudgeBenchmark:
    """Measure a judge on pairs of replies with human labels.

    Args:
        data: `llmbar`, `pandalm`, `mtbench`, `rewardbench`, `judgebench`, `gsm8k-solutions`, or the path of a file of JSON
            lines with `question`, `chosen` and `rejected`, or `question`, `first`, `second` and `label`.
        run: folder of a run, to measure its judge, referee or evaluator; either this or `model`.
        model: model folder or hub id, to measure any judge of the registry.
        judge: for a run `judge` (default), `referee` or `evaluator`; for a model the name of a judge (default: the setting
            `verdicts.judge`) or `referee`.
        files: files of a named data set, or folders that contain them: nothing is downloaded.
        settings: `key=value` strings for a model, such as `verdicts.reasoning=false`.
        sure: Optional. Confidence from which a verdict counts, in [0.5, 1]. Default: `verdicts.keep`, or
            `Evaluator.sure`.
        limit: Optional. Number of pairs, drawn at random. Default: all.
        seed: seed of the sample. Default: 0.
        output: Optional. Folder of the results, with which the same call resumes. Default: nothing is kept.
        progress: write progress to standard error. Default: True.
        trust_remote_code: run code that comes with the model. Default: False.

    Raises:
        InputError: an argument cannot be used.
        DataError: the data cannot be read, or no pair has a label.
        RunFolderError: the run cannot be read, or `output` has results of another judge or of other pairs.
        ModelError: the model cannot be loaded.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    found = read_data(str(data), [Path(file) for file in files])
    pairs = [pair for pair in found if pair.label is not None]
    if not pairs:
        raise DataError(f"no pair of {data} has a label of the majority; label some first")
    folder = None if run is None else local_run(run)
    subject = subject_of(folder, model, judge, settings, sure, trust_remote_code=trust_remote_code)
    picked, terminal = sampled(pairs, limit, seed), Terminal(quiet=not progress)
    with results_store(output, _STAGE) as store:
        outcomes = judge_pairs(store, subject, picked, terminal, trust_remote_code=trust_remote_code)
        cases = [
            Case(pair, outcome.verdict(subject.config.verdicts), outcome.logprobs)
            for pair, outcome in zip(picked, outcomes, strict=True)
        ]
        result = JudgeBenchmark(str(data), subject.as_json(), seed, len(pairs), len(found) - len(pairs), measure(cases))
        store.write_json(store.root / _FILE, result.as_json())
    return result


def judge_pairs(
    store: RunStore,
    subject: Subject,
    pairs: Sequence[LabelledPair],
    terminal: Terminal,
    *,
    logprobs: bool = True,
    trust_remote_code: bool = False,
) -> list[Outcome]:
    """Judge pairs that are not judged yet, and return the outcomes of all, in order. The model is loaded only if needed.

    Args:
        store: folder of the results.
        subject: the judge under test.
        pairs: the pairs.
        terminal: shows progress.
        logprobs: compute the log-probs of the replies under the base. Default: True.
        trust_remote_code: run code that comes with the model. Default: False.

    Raises:
        RunFolderError: the folder has results of another judge or of other pairs.
    """
    refuse_server_of_run(subject, "--model MODEL, with the settings as --set")
    _check_same(store, fingerprint([subject.key, logprobs, [(p.question, p.first, p.second) for p in pairs]]))
    load = partial(subject.load, day_of(store.run), trust_remote_code=trust_remote_code)
    shards = StageShards(store, terminal, _STAGE)
    map_shards(shards, pairs, SHARD, JudgeLabelled(subject, logprobs), InProcess(loaded_once(load, terminal, store)))
    return store.read(_STAGE, Outcome)


def refuse_server_of_run(subject: Subject, instead: str) -> None:
    """Refuse a judge that is a server named by a run folder alone.

    Args:
        subject: the judge.
        instead: what to do instead, for the message.

    Raises:
        InputError: it is one.
    """
    if subject.asks_server and subject.run is not None:
        raise InputError(
            f"the {subject.role} of {subject.run} is a server, and a run folder cannot choose where texts are sent; "
            f"pass {instead}"
        )


def _check_same(store: RunStore, key: str) -> None:
    known = store.run.get("key", key)
    if known != key:
        raise RunFolderError(
            f"{store.root} has results of another judge, other settings or other pairs; pass another --output, or remove it"
        )
    if "key" not in store.run:
        # The date is that of the chat templates, also after a resume on another day.
        store.update_run(kind=_STAGE, key=key, date=day_of({}).isoformat())


def loaded_once(load: Callable[[], ModelHandle], terminal: Terminal, store: RunStore) -> Callable[[], ModelHandle]:
    """Return a function that loads the model when it is first called, and returns the same one later.

    Args:
        load: loads the model.
        terminal: shows that it is being loaded.
        store: folder of the results, which also keeps the answers of a server.
    """
    loaded: list[ModelHandle] = []

    def model() -> ModelHandle:
        if not loaded:
            with terminal.waiting("loading the model"):
                loaded.append(replace(load(), answers=store.root / ANSWERS))
        return loaded[0]

    return model


@contextmanager
def results_store(output: str | Path | None, kind: str) -> Iterator[RunStore]:
    """Open the folder of results, or a temporary one that is removed at the end.

    Args:
        output: Optional. The folder. Default: a temporary one.
        kind: kind of the results, as recorded in the folder's run.json.

    Raises:
        RunFolderError: the folder is that of a run, or has results of another kind.
    """
    with tempfile.TemporaryDirectory() as temporary:
        store = RunStore(Path(temporary) / kind if output is None else Path(output))
        try:
            _refuse_run(store, kind)
            yield store
        finally:
            store.close()


def _refuse_run(store: RunStore, kind: str) -> None:
    if store.run and store.run.get("kind") != kind:
        raise RunFolderError(f"--output {store.root} is the folder of a run or of other results; pass another folder")
