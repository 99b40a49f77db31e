from __future__ import annotations

import numpy as np
import pytest

from selfeval.evaluation.diversity import MOST_QUESTIONS, ReplyVectors, compare_diversity
from selfeval.quality.diversity import distinct_n
from selfeval.quality.embeddings import Vectors


def varied(n: int) -> list[str]:
    return [f"{i} plus {i + 1} is {2 * i + 1}, that is the answer number {i}" for i in range(n)]


def directions(n: int, distinct: int) -> Vectors:
    """Vectors in so many different directions, all orthogonal."""
    return np.eye(distinct, dtype=np.float32)[np.arange(n) % distinct]


def test_a_policy_with_one_reply_lost_its_diversity_on_every_measure() -> None:
    vectors = ReplyVectors("test", directions(40, 8), directions(40, 1))
    found = compare_diversity(varied(40), ["the answer is 7"] * 40, vectors)
    assert found is not None
    assert found.vendi is not None
    assert found.distinct_1.after.known == pytest.approx(4 / 160)
    assert found.distinct_2.before.known == distinct_n(varied(40), 2)
    assert found.self_bleu.after.known == pytest.approx(1.0)
    assert (found.vendi.before.known, found.vendi.after.known) == (pytest.approx(8.0), pytest.approx(1.0))
    for change, sign in ((found.distinct_1, -1), (found.distinct_2, -1), (found.self_bleu, 1), (found.vendi, -1)):
        low, high = change.change.ci_low, change.change.ci_high
        assert low is not None
        assert high is not None
        assert low * sign > 0
        assert high * sign > 0
        assert change.change.known == pytest.approx(change.after.known - change.before.known)
        assert change.change.n == 40


def test_replies_that_did_not_change_have_a_difference_of_zero() -> None:
    found = compare_diversity(varied(30), varied(30))
    assert found is not None
    assert (found.self_bleu.change.known, found.self_bleu.change.ci_low, found.self_bleu.change.ci_high) == (0.0, 0.0, 0.0)
    assert found.vendi is None
    assert found.embedder is None


def test_a_fixed_number_of_questions_is_compared_at_most() -> None:
    found = compare_diversity(varied(MOST_QUESTIONS + 5), varied(MOST_QUESTIONS) + ["the"] * 5)
    assert found is not None
    assert found.questions == found.distinct_1.before.n == MOST_QUESTIONS
    assert found.distinct_1.change.known == 0.0, "the last replies differ, and are left out"
    assert compare_diversity(["one"], ["two"]) is None
