"""The threshold for a wanted error rate: exact values, and the guarantee in a simulation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from selfeval.quality.selective_risk import DELTA, binomial_tail, choose_threshold, fewest_labels, upper_bound


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.83])
def test_the_binomial_tail_is_the_sum_over_all_outcomes(rate: float) -> None:
    for errors in range(6):
        outcomes = [sum(case) for case in product((0, 1), repeat=5)]
        slow = sum(rate**k * (1 - rate) ** (5 - k) for k in outcomes if k <= errors)
        assert binomial_tail(errors, 5, rate) == pytest.approx(slow, abs=1e-12)
    assert binomial_tail(0, 5, 0.0) == 1.0
    assert binomial_tail(4, 5, 1.0) == 0.0


def test_the_upper_bound_is_the_rate_at_which_the_tail_is_delta() -> None:
    assert upper_bound(0, 10) == pytest.approx(1 - DELTA ** (1 / 10), abs=1e-9)
    assert upper_bound(10, 10) == pytest.approx(1.0)
    bound = upper_bound(3, 40, 0.01)
    assert binomial_tail(3, 40, bound) == pytest.approx(0.01, abs=1e-9)
    with pytest.raises(ValueError, match="n = 0"):
        upper_bound(0, 0)


def test_the_smallest_passing_threshold_is_chosen() -> None:
    # 100 right cases at 0.9; those at 0.7 are right in half of the cases, so 0.71 is the last threshold without them.
    confidence, correct = [0.9] * 100 + [0.7] * 100, [True] * 100 + [True, False] * 50
    chosen = choose_threshold(confidence, correct, error=0.1)
    assert chosen.value == 0.71
    assert (chosen.selected, chosen.risk.value, chosen.coverage.value) == (100, 0.0, 0.5)
    assert chosen.bound == pytest.approx(1 - 0.01 ** (1 / 100))
    assert choose_threshold(confidence, correct, error=0.4).value == 0.5


def test_too_few_labels_give_no_threshold() -> None:
    fewest = fewest_labels(0.1)
    assert math.isclose(0.9**44, 0.0097, abs_tol=1e-4)  # below 0.05 / 5, and 0.9^43 = 0.0108 is not
    assert fewest == 44
    assert choose_threshold([0.9] * fewest, [True] * fewest, 0.1).value == 0.5
    without = choose_threshold([0.9] * (fewest - 1), [True] * (fewest - 1), 0.1)
    assert without.value is None
    assert without.bound is not None
    assert without.bound > 0.1
    assert choose_threshold([], [], 0.1).bound is None


LEVELS = np.linspace(0.5, 0.99, 25)
RIGHT_AT = 0.5 + 0.47 * (LEVELS - 0.5) / 0.49
"""Accuracy at each confidence. The risk above a threshold is 0.27 at 0.5, falls, and crosses `WANTED` near 0.64."""
WANTED, LABELS, DRAWS = 0.2, 400, 100


def _draws() -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        picked = rng.integers(0, len(LEVELS), size=LABELS)
        yield LEVELS[picked], rng.random(LABELS) < RIGHT_AT[picked]


def _is_missed(threshold: float) -> bool:
    return bool(1 - RIGHT_AT[threshold <= LEVELS].mean() > WANTED)


def test_the_error_rate_is_at_most_the_wanted_one_in_at_least_95_percent_of_draws() -> None:
    found = [choose_threshold(c.tolist(), right.tolist(), WANTED).value for c, right in _draws()]
    chosen = [value for value in found if value is not None]
    assert len(chosen) > DRAWS / 2  # it is not safe by never choosing
    # At most 5 %, which are 5 draws; 11 is three standard deviations above.
    assert sum(map(_is_missed, chosen)) <= 11


def test_the_measured_risk_alone_would_miss_the_wanted_one() -> None:
    """The same draws without tests: the simulation above can detect a rule without a guarantee."""
    missed = 0
    for confidence, right in _draws():
        passing = [value for value in LEVELS if (at := confidence >= value).any() and (~right[at]).mean() <= WANTED]
        missed += bool(passing) and _is_missed(min(passing))
    assert missed > 0.2 * DRAWS


@pytest.mark.parametrize(("confidence", "correct", "error"), [([0.9], [], 0.1), ([1.2], [True], 0.1), ([0.9], [True], 0.0)])
def test_wrong_input_is_refused(confidence: list[float], correct: list[bool], error: float) -> None:
    with pytest.raises(ValueError, match="got"):
        choose_threshold(confidence, correct, error)
