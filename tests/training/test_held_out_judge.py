from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.judging.protocol import Comparison, Judge, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, Split
from selfeval.training.context import POLICY, JudgeReading
from selfeval.training.held_out_judge import HeldOutJudge


def asked(count: int) -> list[Question]:
    return [Question(f"q{i}", f"What is {i}?", Split.TRAIN, "self") for i in range(count)]


def reading(said: Sequence[float | None]) -> JudgeReading | None:
    """Return the judge's reading of these probabilities that the policy's reply is better; None marks an unreadable verdict."""
    backbone = tiny_models.backbone("llama", 384)
    backbone.roles.add(POLICY)

    class Scripted(Judge):
        def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
            assert backbone.acting == BASE
            assert [c.question for c in comparisons] == [q.text for q in questions]
            return [Judgement(p) for p in said]

    templates = Templates.load(templates_folder("none"), backbone.loaded.tokenizer)
    questions = asked(len(said))
    return HeldOutJudge(backbone, templates, Scripted(), questions, 2, 8, 0)(None)


def test_a_verdict_that_cannot_be_read_does_not_count() -> None:
    found = reading([1.0, 1.0, 0.0, None])
    assert found is not None
    assert found.win_rate == pytest.approx(2 / 3)  # and not 2.5 of 4
    assert found.unparsed == 0.25
    assert found.error == pytest.approx((2 / 9) ** 0.5 / 3**0.5)


def test_where_most_cannot_be_read_there_is_no_reading() -> None:
    assert reading([1.0, None, None, None]) is None
    assert reading([1.0]) is None


def test_the_judge_is_informed_of_replies_that_the_limit_cut_off() -> None:
    backbone, seen = tiny_models.backbone("llama", 384), list[Comparison]()
    backbone.roles.add(POLICY)

    class Scripted(Judge):
        def judge(self, comparisons: Sequence[Comparison], advance: Callable[[int], None] | None = None) -> list[Judgement]:
            seen.extend(comparisons)
            return [Judgement(0.5) for _ in comparisons]

    templates = Templates.load(templates_folder("none"), backbone.loaded.tokenizer)
    HeldOutJudge(backbone, templates, Scripted(), asked(2), 1, 8, 0)(None)
    assert [(c.first_cut, c.second_cut) for c in seen] == [(True, True)] * 2, "an untrained model does not end after one token"
