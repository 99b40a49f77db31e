from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from selfeval.quality.length_control import RIDGE, length_controlled_win_rate


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def root(slope: Callable[[float], float]) -> float:
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2


def slow_fit(scores: list[float], x: list[float]) -> float:
    """θ by coordinate descent with bisection on each derivative: slow, and shares nothing with Newton's method."""

    def error(theta: float, phi: float, weights: list[float]) -> float:
        rows = zip(scores, x, weights, strict=True)
        return sum(w * (sigmoid(theta + phi * a) - y) for y, a, w in rows)

    def penalised(theta: float, phi: float) -> float:
        return error(theta, phi, x) + RIDGE * phi

    theta = phi = 0.0
    for _ in range(400):
        theta = root(partial(error, phi=phi, weights=[1.0] * len(x)))
        phi = root(partial(penalised, theta))
    return theta


def test_matches_a_slow_fit() -> None:
    rng = np.random.default_rng(0)
    d = rng.normal(5, 30, size=25)
    scores = rng.choice([0.0, 0.5, 1.0], size=25).tolist()
    x = [math.tanh(v / float(np.std(d))) for v in d]
    figure = length_controlled_win_rate(scores, d.tolist())
    assert figure.value == pytest.approx(sigmoid(slow_fit(scores, x)), rel=1e-7)
    assert figure.ci_low < figure.value < figure.ci_high  # type: ignore[operator]
    assert figure.n == 25


def test_wins_that_come_from_length_alone_are_taken_away() -> None:
    # The judge prefers the longer reply, 9 times in 10, and nothing else; the first side is usually longer.
    rng = np.random.default_rng(1)
    d = rng.normal(20, 20, size=1000)
    scores = np.where(rng.random(1000) < 0.9, d > 0, d < 0).astype(float)
    figure = length_controlled_win_rate(scores.tolist(), d.tolist())
    assert scores.mean() > 0.75
    assert figure.value == pytest.approx(0.5, abs=0.08)
    assert figure.ci_low < 0.5 < figure.ci_high  # type: ignore[operator]


def test_a_real_advantage_stays() -> None:
    # P(win) = σ(1 + 2 tanh(d / std)): at equal length σ(1) = 0.731. Standard error of the fit about 0.02 at n = 1000.
    rng = np.random.default_rng(2)
    d = rng.normal(0, 50, size=1000)
    p = 1 / (1 + np.exp(-(1 + 2 * np.tanh(d / d.std()))))
    figure = length_controlled_win_rate((rng.random(1000) < p).astype(float).tolist(), d.tolist())
    assert figure.value == pytest.approx(sigmoid(1), abs=0.05)
    assert figure.ci_high - figure.ci_low < 0.12  # type: ignore[operator]


def test_without_variation_in_length_it_is_the_plain_win_rate() -> None:
    scores = [1.0, 1.0, 0.0, 0.5]
    for d in (0.0, 0.1, -7.0):
        assert length_controlled_win_rate(scores, [d] * 4).value == pytest.approx(0.625, rel=1e-9)


def test_a_side_that_wins_everything_has_an_honest_interval() -> None:
    # Ten wins and the two that are added, one lost: a resample of 12 holds 0 losses with probability 0.35, and 3 or more with
    # 0.075, 4 or more with 0.017, so the lowest 2.5% of the resamples hold 3.
    won = length_controlled_win_rate([1.0] * 10, [0.0] * 10)
    assert (won.value, won.ci_high) == (1.0, 1.0)
    assert won.ci_low == pytest.approx(9 / 12, abs=1e-9)
    lost = length_controlled_win_rate([0.0] * 10, [0.0] * 10)
    assert (lost.value, lost.ci_low) == (0.0, 0.0)
    assert lost.ci_high == pytest.approx(3 / 12, abs=1 / 12 + 1e-9)


def test_ties_alone_are_no_proof_of_a_tie() -> None:
    tied = length_controlled_win_rate([0.5] * 10, list(range(10)))
    assert tied.value == pytest.approx(0.5, abs=1e-9)
    assert tied.ci_low < 0.45  # type: ignore[operator]
    assert tied.ci_high > 0.55  # type: ignore[operator]


def test_length_that_separates_wins_from_losses_does_not_crash() -> None:
    # Longer always wins, symmetrically: θ = 0 by symmetry, however large φ would like to be.
    figure = length_controlled_win_rate([0, 0, 0, 1, 1, 1], [-3, -2, -1, 1, 2, 3])
    assert figure.value == pytest.approx(0.5, abs=1e-9)
    assert 0 <= figure.ci_low <= figure.ci_high <= 1  # type: ignore[operator]


def test_one_seed_gives_one_interval_and_nothing_gives_none() -> None:
    scores, d = [1.0, 0.0, 1.0, 0.5, 0.0, 1.0], [3.0, -2.0, 5.0, 0.0, 4.0, -1.0]
    assert length_controlled_win_rate(scores, d, seed=3) == length_controlled_win_rate(scores, d, seed=3)
    assert length_controlled_win_rate([], []).as_json() == {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    assert length_controlled_win_rate([1.0], [4.0]).value == 1.0
    assert length_controlled_win_rate([0.5], [4.0]).value == pytest.approx(0.5)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        length_controlled_win_rate([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="scores must be in"):
        length_controlled_win_rate([2.0], [1.0])
    with pytest.raises(ValueError, match="finite"):
        length_controlled_win_rate([1.0], [math.nan])
