"""Replies before and after training against references."""

from __future__ import annotations

import pytest

from selfeval import text_metrics
from selfeval.evaluation.policy import Answered
from selfeval.evaluation.reference_scores import REFERENCE_METRICS, score_by_references

REFERENCES = [[f"Tom has {n} red apples left."] for n in range(12)]
ANSWERED = [
    Answered("q", f"It is {n}, I think.", f"Tom has {n} apples left.", 4, 5, True, True, 0.0, "win", None, None)
    for n in range(12)
]


def test_scores_and_differences():
    found = score_by_references(ANSWERED, REFERENCES)
    assert [row.name for row in found.metrics] == list(REFERENCE_METRICS)
    for row in found.metrics:
        assert row.difference.value == pytest.approx(row.after.value - row.before.value)
        assert row.difference.ci_low > 0
        assert row.after.n == 12
    # Five of five words, in order, of the six of the reference: P = 1, R = 5/6.
    assert found.metrics[2].after.value == pytest.approx(10 / 11)
    alone = text_metrics([a.before for a in ANSWERED], REFERENCES, metrics=["bleu"])["bleu"].figure
    assert found.metrics[0].before.value == pytest.approx(alone.value)


def test_questions_without_a_reference_are_left_out():
    some = [several if place < 10 else () for place, several in enumerate(REFERENCES)]
    assert score_by_references(ANSWERED, some) == score_by_references(ANSWERED[:10], REFERENCES[:10])
    assert score_by_references(ANSWERED, [()] * 12) is None
