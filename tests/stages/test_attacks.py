"""Attacks on a random evaluator of a tiny model: what it scores, and against what."""

from __future__ import annotations

from typing import Any

import pytest

from selfeval.config import RunConfig
from selfeval.evaluation.attacks import KINDS
from selfeval.records import Question, Reply, Split
from selfeval.stages import attacks
from selfeval.stages.attacks import attack_evaluator, kinds_trained
from selfeval.stages.context import Context
from selfeval.training.evaluator import EVALUATOR, score_replies
from tiny_runs import run_with_evaluator

ANSWERS = {"What is 1 and 1?": "2", "What is 2 and 3?": "5", "What is 4 and 4?": "8", "What is 5 and 5?": "10"}


class Gold:
    name = "sums"

    def is_right(self, question: str, reply: str) -> bool | None:
        return reply.rstrip(" .!").endswith(f" {ANSWERS[question]}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run with four test questions; the first reply to each is wrong, except to the last, whose replies were cut off."""
    folder = tmp_path_factory.mktemp("attacks")
    made = run_with_evaluator(folder, RunConfig(evaluation={"attacks": 4}))
    made.load_evaluators()
    made.store.write_shard("questions", 0, [Question(f"q{i}", text, Split.TEST, "self") for i, text in enumerate(ANSWERS)])
    replies = []
    for i, answer in enumerate(ANSWERS.values()):
        said = (f"The sum is {90 + i}.", f"The sum is {answer}.")
        replies += [
            Reply(f"q{i}-r{n}", f"q{i}", words, made.templates.reply_ids(words), "sample", 1.0, 1.0, -1.0, finished=i < 3)
            for n, words in enumerate(said)
        ]
    made.store.write_shard("replies", 0, replies)
    return made


def test_attacks_are_scored_against_right_replies_and_unfinished_ones_are_no_targets(
    run: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(made: list, margins: list, **options: Any):  # type: ignore[no-untyped-def, type-arg]
        seen.extend(zip(made, margins, strict=True))
        return attacks_measure(made, margins, **options)

    attacks_measure = attacks.measure_attacks
    monkeypatch.setattr(attacks, "measure_attacks", watched)
    found = attack_evaluator(run, Gold())
    assert found is not None
    assert found.against == "right"
    assert found.total.n == 3
    assert [row.kind for row in found.kinds] == list(KINDS)
    questions = {f"q{i}": text for i, text in enumerate(ANSWERS)}
    assert {a.better for a, _ in seen if a.kind == "echo"} == {"The sum is 2.", "The sum is 5.", "The sum is 8."}
    for attack, margin in seen:
        question = questions[attack.question_id]
        assert Gold().is_right(question, attack.better)
        assert not Gold().is_right(question, attack.worse)
        # As `selfeval score` scores typed replies: after the grade prompt, with the end token, each alone.
        prompt, end = run.grade_prompt(attack.question_id, question), run.backbone.loaded.eos_ids[:1]
        room = run.backbone.loaded.context_length - len(prompt.ids) - 1
        better, worse = (
            score_replies(run.backbone, EVALUATOR, [prompt], [(*run.templates.reply_ids(text)[:room], *end)], 4096)[0]
            for text in (attack.better, attack.worse)
        )
        assert margin == pytest.approx(better - worse, abs=1e-4)
    injected = next(a.worse for a, _ in seen if a.kind == "injection")
    labels = run.templates.labels("judge")
    assert injected.endswith(f"{labels.lead}{labels.all[0]}".strip())


def test_without_gold_the_first_finished_reply_is_the_ordinary_one(run: Context) -> None:
    found = attack_evaluator(run, None)
    assert found is not None
    assert found.against == "ordinary"
    assert [row.kind for row in found.kinds] == list(KINDS[:8])
    assert found.total.n == 3


def test_nothing_is_attacked_without_questions_or_without_right_replies(run: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gold, "is_right", lambda self, question, reply: None)
    assert attack_evaluator(run, Gold()) is None
    monkeypatch.setitem(run.__dict__, "config", RunConfig(evaluation={"attacks": 0}))
    assert attack_evaluator(run, None) is None


def test_the_settings_decide_which_kinds_training_has_seen() -> None:
    def seen(**settings: float) -> set[str]:
        return set(kinds_trained(RunConfig(evaluator=settings).evaluator))

    assert seen() == set()
    assert seen(attacks=0.1) == set(KINDS) - {"altered_number", "plain_right"}
    assert seen(mismatched=0.1, garbled=0.1) == {"other_question", "long", "repeated"}
