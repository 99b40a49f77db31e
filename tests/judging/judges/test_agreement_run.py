"""A run with the agreement judge: the whole loop of the embedded model at toy size, and the judge loaded from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfeval.cli.app import app
from selfeval.evaluation.verdicts import label_is_right
from selfeval.lab.oracle import WordProblems
from selfeval.records import AgreementEvidence, VerdictState
from selfeval.runs.judge import Judge
from selfeval.runs.reader import RunReader
from toy import FEW, copy_lab, toy_arguments

SETTINGS = (
    *("verdicts.judge=agreement", "verdicts.agreement.votes=8", "verdicts.max_new_tokens=64", "verdicts.reasoning=false"),
    *("replies.max_new_tokens=64", "verdicts.keep=0.7", "policy.iterations=1", "evaluator.epochs=1"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    # The prompts of the other judge are not needed.
    recipe = copy_lab(folder / "lab")
    (folder / "lab" / "word_problems" / "templates" / "judge.jinja").unlink()
    done = invoke(recipe, folder / "run")
    assert "chose the reply shown first" not in done
    assert "verdicts: probe of 16 pairs: kept " in done
    return folder


def invoke(recipe: Path, output: Path) -> str:
    more = [part for setting in SETTINGS for part in ("--set", setting)]
    done = CliRunner().invoke(app, toy_arguments(recipe, output, *more, sizes=FEW))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_is_labelled_by_votes(run: Path) -> None:
    reader, gold = RunReader(run / "run"), WordProblems()
    questions = {question.id: question.text for question in reader.records("questions")}
    replies = {reply.id: reply for reply in reader.records("replies")}
    verdicts = reader.records("verdicts")
    assert {verdict.state for verdict in verdicts} >= {VerdictState.KEPT, VerdictState.TIE, VerdictState.UNSURE}
    rights = []
    for verdict in verdicts:
        assert isinstance(verdict.evidence, AgreementEvidence)
        assert len(verdict.evidence.causes) == 8
        if verdict.state == VerdictState.KEPT:
            right = [
                gold.is_right(questions[verdict.question_id], replies[name].text) for name in (verdict.first, verdict.second)
            ]
            rights.append(label_is_right(verdict, (right[0], right[1])))
    known = [right for right in rights if right is not None]
    assert len(known) >= 8
    assert sum(known) >= 0.7 * len(known)  # nothing that labels pairs has seen the gold
    report = json.loads((run / "run" / "report.json").read_text())
    assert report["verdicts"]["swap_consistency"]["n"] == 0
    assert 0.4 < report["verdicts"]["majority_share"]["value"] < 1
    assert report["evaluator"]["baselines"]["judge"]["n"] > 0
    assert report["policy"]["win_rate"]["n"] + report["policy"]["unparsable"] == 12  # the referee compares in both orders
    page = (run / "run" / "index.html").read_text()
    assert "Share of the votes for the most frequent answer" in page
    assert "when the order is swapped" not in page


def test_a_lost_shard_is_judged_again_with_the_same_votes(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run / "run", tmp_path / "run"))
    [first, *_] = before = sorted((copy / "verdicts").glob("shard-*.jsonl"))
    said = [path.read_bytes() for path in before]
    first.unlink()
    more = [part for setting in SETTINGS for part in ("--set", setting)]
    arguments = toy_arguments(run / "lab" / "recipe.toml", copy, *more, "--until", "verdicts", sizes=FEW)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert [path.read_bytes() for path in before] == said


def test_the_judge_of_the_run_compares_typed_replies(run: Path) -> None:
    judge = Judge.load(run / "run")
    question = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
    found, tie = judge.compare_all([(question, "The answer is 6.", "I say 5"), (question, "5", "The answer is 5.")])
    assert (found.preferred, found.state) == ("b", "kept")
    assert (tie.preferred, tie.state) == ("unsure", "tie")
    assert judge.compare(question, "The answer is 6.", "I say 5").probability == found.probability
    assert found.judgement is not None
    assert isinstance(found.judgement.evidence, AgreementEvidence)
    assert found.judgement.evidence.answers == ("6", "5")
