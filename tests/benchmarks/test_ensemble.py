from __future__ import annotations

from typing import Any

import ensemble
import numpy as np
import pytest
from ensemble import INPUTS, Replies, Selected


def replies(right: list[bool], answers: list[str | None], first: list[float]) -> Replies:
    """Three distinct replies to a question, sampled 128, 96 and 32 times; only the first member has scores."""
    scores = [first, *([[0.0] * 3] * (len(INPUTS) - 1))]
    row: dict[str, Any] = {"counts": [128, 96, 32], "right": right, "answers": answers, "scores": scores}
    return Replies.of({**row, "reference_scores": first, "reference_right": right[0], "reference_answer": "5"})


def test_a_reply_has_the_share_of_its_answer_and_a_cut_off_one_has_none() -> None:
    found = replies([True, True, False], ["5", "5", None], [0.0, 0.0, 0.0])
    assert found.share.tolist() == [224 / 256, 224 / 256, 0.0]
    assert found.follows_reference.tolist() == [True, True, False]


def test_replies_with_the_same_highest_score_count_by_their_number() -> None:
    scores = np.array([2.0, 1.0, 2.0])
    # The first is right 128 times, the third wrong 32 times.
    assert ensemble.best(np.array([1.0, 0.0, 0.0]), scores, np.array([128, 96, 32])) == pytest.approx(128 / 160)


def test_the_share_of_the_gap_that_an_arm_closes() -> None:
    one = Selected(np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.9, 0.9, 0.9, 0.9]))
    other = Selected(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.9, 0.9, 0.9, 0.9]))
    found = ensemble.compare(one, other)
    # Gaps of 3.6 - 2 = 1.6 and 3.6 - 3 = 0.6 over four questions.
    assert found["gap_closed"]["value"] == pytest.approx(1 - 0.6 / 1.6)
    assert found["gold_more"]["value"] == pytest.approx(1 / 4)


def test_nothing_is_fitted_on_the_question_itself() -> None:
    # The evaluator prefers the right reply to the first question only; its promise there is fitted on the other one.
    good, bad = ([True, False, False], [3.0, 0.0, 0.0]), ([False, True, True], [3.0, 0.0, 0.0])
    found = ensemble.cross_fitted([replies(right, ["5", "6", "7"], first) for right, first in (good, bad)], folds=2)
    selected = found["one evaluator"]
    assert selected.gold.tolist() == [1.0, 0.0]
    assert selected.promise[0] < 0.2
    assert selected.promise[1] > 0.8
