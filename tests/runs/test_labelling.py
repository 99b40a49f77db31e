"""Labels of a finished run: the next pair, the figures, the report, the threshold, and training on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import selfeval
from selfeval import Run
from selfeval.errors import InputError, RunFolderError
from selfeval.labelling.label_file import LABELS, LabelFile
from selfeval.labelling.queue_file import QUEUE
from selfeval.labelling.threshold_file import THRESHOLD, saved_sure, write_threshold
from selfeval.labelling.training import CONFIDENCE
from selfeval.quality.selective_risk import Threshold, choose_threshold
from selfeval.records import Label, Pair, Verdict, VerdictState
from selfeval.runs.label_report import update_labels
from selfeval.runs.labelling import LabelSession, LabelTask
from selfeval.runs.reader import RunReader
from selfeval.store import Fresh, Ledger
from toy import ToyRun


@pytest.fixture
def run(toy_run: ToyRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_run.folder, tmp_path / "run"))


def _label(folder: Path, keys: str, *more: str) -> str:
    found = selfeval("label", str(folder), "--terminal", "--rater", "ann", *more, given=keys)
    assert found.returncode == 0, found.stderr
    return found.stdout


def _texts(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("pairs/*/shard-*.jsonl"))]


def _manifests(folder: Path) -> dict[str, str]:
    names = ("questions", "replies", "verdicts", "pairs", "evaluator", "policy", "evaluation")
    return {name: (folder / name / "manifest.json").read_text() for name in names}


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_command_labels_through_a_pipe_and_continues(run: Path) -> None:
    out = _label(run, "1 0\nu s x")
    assert "Pair 1 of 16" in out
    assert "Took back the last answer." in out
    assert "There is no key 'x': 1 first is better" in out
    choices = [label.choice for label in LabelFile(run).read()]
    assert choices == ["first", "tie", "undo", "skip"]
    assert (run / QUEUE).is_file()
    # The same pairs in the same order: one and two are answered.
    assert "Pair 3 of 16" in _label(run, "2q1").split("Reply 1")[0]
    assert len(LabelFile(run).read()) == 5
    figures = json.loads(_label(run, "", "--json"))
    assert (figures["pairs"], figures["labelled"], figures["skipped"], figures["raters"]) == (16, 2, 1, 1)
    assert figures["evaluator"]["n"] == 2


def test_a_number_of_pairs_ends_the_session(run: Path) -> None:
    assert "No pair is left." in _label(run, "1" * 16, "--pairs", "3")
    assert len(LabelFile(run).read()) == 3


def test_the_texts_reveal_neither_the_judge_nor_the_evaluator(run: Path) -> None:
    first = _label(run, "q").split("No threshold")[0]
    assert "Question" in first
    assert not {"evaluator", "judge", "probability", "score", "r0", "r1"} & set(first.lower().split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--rater", " "], "not a name of 1 to 100 printable characters"),
        (["--json", "--use-for-training"], "pass one of both"),
        (["--pairs", "0"], "Invalid value for '--pairs'"),
    ],
)
def test_wrong_options_are_refused(toy_run: ToyRun, arguments: list[str], problem: str) -> None:
    found = selfeval("label", str(toy_run.folder), *arguments)
    assert found.returncode == 2
    assert problem in " ".join(found.stderr.split())


def test_a_run_before_its_evaluation_has_nothing_to_label(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    with pytest.raises(RunFolderError, match="has no scored pairs yet: the stage evaluation"):
        LabelTask(run)
    assert LabelTask(run, for_training=True).pairs


# -- the API ------------------------------------------------------------------------------------------------------------


def _answer_all(task: LabelTask, rater: str, choose: Any, most: int | None = None) -> Iterator[Label]:
    session = LabelSession(task, rater, most)
    while (shown := session.next_pair()) is not None:
        yield session.answer(shown, choose(shown))


def test_raters_see_the_same_pairs_and_their_own_order_of_replies(run: Path) -> None:
    task = LabelTask(run)
    ann = list(_answer_all(task, "ann", lambda shown: "first"))
    bob = list(_answer_all(task, "bob", lambda shown: "first"))
    assert [a.question_id for a in ann] == [b.question_id for b in bob]
    assert 0 < sum(a.first != b.first for a, b in zip(ann, bob, strict=True)) < 16
    assert LabelSession(task, "ann").progress == (16, 16)
    found = task.agreement()
    assert found.raters == {"ann": 16, "bob": 16}
    assert found.kappa is not None
    assert [label.rater for label in Run.open(run).records("labels")] == ["ann"] * 16 + ["bob"] * 16


def test_a_pair_that_is_not_in_the_run_cannot_be_labelled(run: Path) -> None:
    task = LabelTask(run)
    one = task.pairs[0]
    with pytest.raises(InputError, match="not among the pairs to label"):
        task.record("ann", one.question_id, one.first, "q9-r9", "tie", texts=one.texts)
    with pytest.raises(InputError, match='there is no answer "both"; use first, second, tie, skip, undo'):
        task.record("ann", one.question_id, one.first, one.second, "both", texts=one.texts)
    assert not (run / LABELS).exists()


def test_undo_goes_back_one_answer_at_a_time(run: Path) -> None:
    session = LabelSession(LabelTask(run), "ann")
    assert session.next_pair() == session.next_pair(), "nothing was answered"
    pairs = []
    for _ in range(2):
        one = session.next_pair()
        assert one is not None
        session.answer(one, "first")
        pairs.append(one)
    assert [session.undo(), session.undo(), session.undo()] == [pairs[1], pairs[0], None]
    assert session.next_pair() == pairs[0]


# -- the report ---------------------------------------------------------------------------------------------------------


def test_the_report_follows_the_labels_and_the_run_stays_intact(run: Path) -> None:
    before = json.loads((run / "report.json").read_text())
    assert "labels" not in before
    assert update_labels(run) is False
    list(_answer_all(LabelTask(run), "ann", lambda shown: "first", 5))
    found = selfeval("report", str(run), "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["labels"]["labelled"] == 5
    assert report["labels"]["gold"] is False, "word problems have an oracle"
    assert {**report, "labels": None} == {**before, "labels": None}
    assert isinstance(Ledger(run).state("report"), Fresh)
    assert "Labels of people" in (run / "index.html").read_text()
    # Taken back, they leave no trace in the report.
    (run / LABELS).unlink()
    assert update_labels(run) is True
    assert json.loads((run / "report.json").read_text()) == before


def test_a_resumed_run_updates_the_report_and_nothing_else(run: Path) -> None:
    manifests = _manifests(run)
    list(_answer_all(LabelTask(run), "ann", lambda shown: "second", 4))
    found = selfeval("run", "--output", str(run))
    assert found.returncode == 0, found.stderr
    assert json.loads((run / "report.json").read_text())["labels"]["labelled"] == 4
    assert _manifests(run) == manifests, "labels without --use-for-training reach no stage before the report"


# -- the threshold ------------------------------------------------------------------------------------------------------


def _threshold(sure: float | None) -> Threshold:
    if sure is None:
        return choose_threshold([0.9], [True], 0.1)
    return choose_threshold([sure] * 60, [True] * 60, 0.1)


def test_a_threshold_is_saved_with_its_evaluator(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert saved_sure(run) is None
    write_threshold(run, _threshold(0.93))
    assert saved_sure(run) == 0.5, "every pair was at 0.93, so the smallest threshold is right as well"
    evaluator = run / "roles" / "evaluator-0" / "evaluator.json"
    evaluator.write_text(evaluator.read_text().replace('"mean": ', '"mean": 1'))
    assert saved_sure(run) is None
    assert "is of an earlier evaluator and not used" in caplog.text
    write_threshold(run, _threshold(None))
    assert not (run / THRESHOLD).exists()


def test_the_command_scores_with_the_threshold_from_labels(run: Path) -> None:
    def unsure(*more: str) -> bool:
        asked = ["--question", "How many?", "--reply", "The answer is 3", "--reply", "The answer is 4"]
        found = selfeval("score", str(run), *asked, "--json", *more)
        assert found.returncode == 0, found.stderr
        return bool(json.loads(found.stdout)["unsure"])

    assert unsure("--sure", "1.0")
    assert not unsure("--sure", "0.5")
    write_threshold(run, _threshold(0.93))
    assert not unsure(), "0.5"
    values = json.loads((run / THRESHOLD).read_text())
    (run / THRESHOLD).write_text(json.dumps({**values, "sure": 1.0}))
    assert unsure()
    (run / THRESHOLD).write_text(json.dumps({**values, "sure": 0.3}))
    found = selfeval("score", str(run), "--question", "Q", "--reply", "a")
    assert found.returncode == 2
    assert "sure is 0.3 instead of a number from 0.5 to 1" in found.stderr


# -- training -----------------------------------------------------------------------------------------------------------


def test_labels_for_training_become_pairs_and_rerun_what_depends_on_them(run: Path) -> None:
    before, texts = _manifests(run), _texts(run)
    out = _label(run, "1210", "--use-for-training")
    assert "4 of 47 training pairs answered" in out or "training pairs answered" in out
    labels = {frozenset((one.first, one.second)): one for one in LabelFile(run).read()}
    verdicts = [v for v in RunReader(run).records("verdicts") if frozenset((v.first, v.second)) in labels]
    assert {v.state for v in verdicts} != {VerdictState.KEPT}, "pairs that the judge did not keep come first"
    refused = selfeval("run", "--output", str(run))
    assert refused.returncode == 2
    assert "the verdicts or the labels for training have changed" in refused.stderr
    assert all(f"{name} (" in refused.stderr for name in ("pairs", "evaluator", "policy", "evaluation"))
    assert _manifests(run) == before
    found = selfeval("run", "--output", str(run), "--until", "pairs", "--restart")
    assert found.returncode == 0, found.stderr
    after = {name: (run / name / "manifest.json").read_text() for name in ("questions", "replies", "verdicts")}
    assert after == {name: before[name] for name in after}
    _check_pairs(run, labels, verdicts)
    # Without the labels, the pairs are those that the judge kept.
    (run / LABELS).unlink()
    assert selfeval("run", "--output", str(run), "--until", "pairs", "--restart").returncode == 0
    assert _texts(run) == texts


def _check_pairs(run: Path, labels: dict[frozenset[str], Label], verdicts: list[Verdict]) -> None:
    replies = {reply.id: reply.text for reply in RunReader(run).records("replies")}
    pairs: list[Pair] = RunReader(run).records("pairs", split="train")
    for verdict in verdicts:
        label = labels[frozenset((verdict.first, verdict.second))]
        found = [(p.chosen, p.rejected, p.confidence) for p in pairs if p.question_id == verdict.question_id]
        shown = replies[label.first], replies[label.second]
        if label.choice == "tie":
            assert not {shown, shown[::-1]} & {one[:2] for one in found}
        else:
            assert (*(shown if label.choice == "first" else shown[::-1]), CONFIDENCE) in found
