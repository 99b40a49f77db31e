"""Check the judge of a run against human labels, and write pairs of the run for people to label: `selfeval judge-check`."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.errors import DataError, InputError
from selfeval.judge_benchmark.benchmark import judge_pairs, refuse_server_of_run
from selfeval.judge_benchmark.figures import Case
from selfeval.judge_benchmark.formats import OWN, read_pairs
from selfeval.judge_benchmark.label_figures import LabelCheck, check_labels
from selfeval.judge_benchmark.pairs import LABELS as CHOICES
from selfeval.judge_benchmark.pairs import LabelledPair, in_random_order
from selfeval.judge_benchmark.subject import Subject, subject_of
from selfeval.labelling.label_file import LABELS
from selfeval.records import Verdict
from selfeval.runs.labelling import LabelTask
from selfeval.runs.reader import RunReader
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_file
from selfeval.store.remote.places import local_run

__all__ = ["JudgeCheck", "judge_check", "write_unlabelled"]

_Texts = tuple[str, str, str]


@dataclass(frozen=True)
class JudgeCheck:
    """The result of `judge_check`.

    Attributes:
        judge: role, judge, model, run and settings of the verdicts.
        recorded: number of pairs whose verdict is in the run; the others were judged now.
        unlabelled: number of pairs that are left out: without a label, or without a majority of the labels.
        informed: number of labelled pairs of `selfeval label` that are left out because they are no uniform sample.
        figures: the figures.
    """

    judge: dict[str, Any]
    recorded: int
    unlabelled: int
    informed: int
    figures: LabelCheck

    def as_json(self) -> dict[str, Any]:
        """Return everything in the form of report.json."""
        counts = {"recorded": self.recorded, "unlabelled": self.unlabelled, "informed": self.informed}
        return {"judge": self.judge, **counts, **self.figures.as_json()}


def judge_check(
    run: str | Path,
    labels: str | Path,
    *,
    error: float = 0.1,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> JudgeCheck:
    """Compare the judge of a run with human labels, and choose `verdicts.keep` for a wanted error rate.

    Pairs that the run has judged keep their verdict; others are judged now, by the judge of the run. The threshold holds for
    new pairs that are drawn as the labelled ones were (`choose_threshold`): label pairs of `write_unlabelled`. Of the labels
    that `selfeval label` saved in the run, those of a uniform sample of its test pairs are used: the others were drawn because
    a label adds much there, so the judge is wrong on them too often.

    Args:
        run: folder of the run.
        labels: JSON lines with `question`, `first`, `second` and `label` (`first`, `second` or `tie`), or `labels.jsonl` of the
            run.
        error: wanted error rate of kept verdicts, in (0, 1). Default: 0.1.
        progress: write progress to standard error. Default: True.
        trust_remote_code: run code that comes with the model. Default: False.

    Raises:
        InputError: error is not between 0 and 1.
        DataError: the labels cannot be read, or there is none.
        RunFolderError: the run cannot be read.
    """
    if not 0 < error < 1:
        raise InputError(f"error must be between 0 and 1, got {error}; it is the wanted share of wrong labels, such as 0.1")
    run = local_run(run)
    found, informed = _read(run, Path(labels))
    pairs = [pair for pair in found if pair.label is not None]
    if not pairs:
        raise DataError(f"no pair of {labels} has a label; set label to first, second or tie")
    subject = subject_of(run)
    recorded = _recorded(RunReader(run))
    known = [case for pair in pairs if (case := _known(pair, recorded)) is not None]
    others = [pair for pair in pairs if _known(pair, recorded) is None]
    if others:
        refuse_server_of_run(subject, "labels of pairs that this run judged, whose verdicts are in the folder")
    judged = _judged(subject, others, Terminal(quiet=not progress), trust_remote_code) if others else []
    return JudgeCheck(
        subject.as_json(),
        len(known),
        len(found) - len(pairs),
        informed,
        check_labels([*known, *judged], error, subject.config.verdicts),
    )


def _read(run: Path, labels: Path) -> tuple[list[LabelledPair], int]:
    """Return the pairs of a file, and the number of labelled pairs that are left out because they are no uniform sample."""
    if labels.resolve() != (run / LABELS).resolve():
        return read_pairs(OWN, [labels]), 0
    task = LabelTask(run)
    uniform = task.uniform_labels()
    found = [LabelledPair(*texts, tuple(label for label in CHOICES if choice == label)) for texts, choice in uniform]
    return found, len(task.labels()) - len(found)


def write_unlabelled(run: str | Path, path: str | Path, n: int = 50, seed: int = 0) -> int:
    """Write pairs of a run for people to label, drawn at random from all judged pairs, whatever their verdict.

    The order of the pairs and of both replies is random, and the file does not contain the verdict.

    Args:
        run: folder of the run.
        path: the new file: JSON lines with `question`, `first`, `second`, and `label`, which is null.
        n: maximum number of pairs. Default: 50.
        seed: seed of the sample. Default: 0.

    Returns:
        The number of pairs.

    Raises:
        InputError: the file exists, or n is not positive.
        RunFolderError: the run cannot be read, or has no verdicts yet.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    if Path(path).exists():
        raise InputError(f"{path} exists and may contain labels; pass a new file")
    # Records are in the order of the questions, and the position of a reply must not depend on the verdict either.
    pairs = [in_random_order(*texts) for texts in _recorded(RunReader(local_run(run)))]
    picked = random.Random(f"{seed}/labels").sample(pairs, min(n, len(pairs)))
    rows = [{"question": pair.question, "first": pair.first, "second": pair.second, "label": None} for pair in picked]
    write_file(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _recorded(reader: RunReader) -> dict[_Texts, Verdict]:
    """Return the verdicts of the run by question and replies; none if its labels are from the user's file."""
    if reader.config.pairs.file:
        return {}
    questions = {question.id: question.text for question in reader.records("questions")}
    replies = {reply.id: reply.text for reply in reader.records("replies")}
    return {(questions[v.question_id], replies[v.first], replies[v.second]): v for v in reader.records("verdicts")}


def _known(pair: LabelledPair, recorded: Mapping[_Texts, Verdict]) -> Case | None:
    """Return the pair in the order of its verdict."""
    for one in (pair, pair.swapped):
        verdict = recorded.get((one.question, one.first, one.second))
        if verdict is not None:
            return Case(one, verdict)
    return None


def _judged(subject: Subject, pairs: Sequence[LabelledPair], terminal: Terminal, trusted: bool) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(Path(folder) / "check")
        try:
            outcomes = judge_pairs(store, subject, pairs, terminal, logprobs=False, trust_remote_code=trusted)
        finally:
            store.close()
    config = subject.config.verdicts
    return (Case(pair, outcome.verdict(config)) for pair, outcome in zip(pairs, outcomes, strict=True))
