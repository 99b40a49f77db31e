"""Accuracies without labels: recovered from simulated judges, and the closed form of two judges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from selfeval.quality.dawid_skene import fit_accuracies, vote_probability


def simulated(
    accuracies: tuple[float, ...], voting: tuple[float, ...], pairs: int = 6000, seed: int = 0
) -> tuple[list[list[int]], NDArray[np.int64]]:
    """Votes of independent judges, which vote on a share of the pairs, and the better reply of each pair."""
    rng = np.random.default_rng(seed)
    truth = rng.choice((-1, 1), pairs)
    right = rng.random((pairs, len(accuracies))) < accuracies
    votes = np.where(right, truth[:, None], -truth[:, None]) * (rng.random(right.shape) < voting)
    return votes.tolist(), truth


@pytest.mark.parametrize("voting", [(1.0, 1.0, 1.0), (0.9, 0.5, 0.7)])
@pytest.mark.parametrize("accuracies", [(0.9, 0.75, 0.6), (0.7, 0.7, 0.95)])
def test_the_accuracies_of_three_judges_are_recovered(accuracies: tuple[float, ...], voting: tuple[float, ...]) -> None:
    found = fit_accuracies(simulated(accuracies, voting)[0])
    # A weak third judge says little about the other two: their errors are up to 0.07 over several seeds, 0.03 with this one.
    assert found == pytest.approx(accuracies, abs=0.06)


def test_a_judge_that_guesses_has_no_weight() -> None:
    one, other, guess = fit_accuracies(simulated((0.85, 0.8, 0.5), (1.0, 1.0, 1.0))[0])
    assert guess == pytest.approx(0.5, abs=0.03)
    # Beside a guess, two judges are known as two judges alone: by their agreement.
    assert one * other + (1 - one) * (1 - other) == pytest.approx(0.85 * 0.8 + 0.15 * 0.2, abs=0.02)
    votes = [(a, -a, a) for a in (1, -1)] * 400 + [(a, a, a) for a in (1, -1)] * 100  # the second one contradicts both others
    assert fit_accuracies(votes)[1] == 0.5


def test_two_judges_have_the_accuracy_that_explains_their_agreement() -> None:
    votes = [(1, 1)] * 4500 + [(-1, -1)] * 4500 + [(1, -1)] * 500 + [(-1, 1)] * 500 + [(0, 1)] * 3000
    # c = 0.9: (1 + sqrt(0.8)) / 2. Single votes change nothing.
    expected = (1 + math.sqrt(0.8)) / 2
    assert fit_accuracies(votes) == pytest.approx((expected, expected), abs=1e-3)


def test_judges_that_never_vote_together_are_not_known() -> None:
    assert fit_accuracies([(1, 0), (0, -1)] * 50) == (0.5, 0.5)
    assert fit_accuracies([]) == ()
    assert fit_accuracies([(1, 1)] * 3)[0] < 0.9  # three agreements are no proof
    with pytest.raises(ValueError, match="1, -1 or 0"):
        fit_accuracies([(1, 2)])


def test_judges_that_share_their_mistakes_seem_better_than_they_are() -> None:
    votes, truth = simulated((0.7, 0.7), (1.0, 1.0))
    copied = [(a, a, b) for a, b in votes]  # the second judge copies the first one
    found = fit_accuracies(copied)
    assert found[0] > 0.9
    assert np.mean(np.array(copied)[:, 0] == truth) < 0.72


def test_the_pooled_probability_is_bayes_rule() -> None:
    # P(votes | first) = 0.9 * 0.3 and P(votes | second) = 0.1 * 0.7.
    assert vote_probability((1, -1), (0.9, 0.7)) == pytest.approx(0.27 / (0.27 + 0.07))
    assert vote_probability((-1, 1), (0.9, 0.7)) == pytest.approx(0.07 / (0.27 + 0.07))
    assert vote_probability((0, 0), (0.9, 0.7)) == 0.5
    assert vote_probability((1, 1), (0.9, 0.5)) == pytest.approx(0.9)


def test_the_pooled_probabilities_are_calibrated_and_beat_the_best_judge() -> None:
    votes, truth = simulated((0.85, 0.8, 0.75), (0.9, 0.9, 0.9), seed=2)
    accuracies = fit_accuracies(votes)
    pooled = np.array([vote_probability(row, accuracies) for row in votes])
    decided = pooled != 0.5
    right = (pooled > 0.5) == (truth > 0)
    confidence = np.maximum(pooled, 1 - pooled)
    assert np.mean(right[decided]) == pytest.approx(np.mean(confidence[decided]), abs=0.02)
    first = np.array(votes)[:, 0]
    assert np.mean(right[decided]) > np.mean((first == truth)[first != 0]) + 0.02
