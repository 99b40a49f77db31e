"""New seeds: uncertainty of the neighbours, and candidates that differ."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from selfeval.quality import seed_recommendation
from selfeval.quality.embeddings import unit_rows
from selfeval.quality.seed_recommendation import expected_uncertainty, farthest_first, spread_margin_temperature

AXES = np.eye(4, dtype=np.float32)


def test_the_confidence_in_a_spread_margin_is_close_to_the_mean_confidence() -> None:
    """Against the integral over the margin, by the midpoints of 2000 quantiles of the normal distribution."""
    from statistics import NormalDist

    margin, temperature, spread = 1.5, 0.7, 2.0
    margins = [NormalDist(margin, spread).inv_cdf((n + 0.5) / 2000) for n in range(2000)]
    mean = sum(1 / (1 + math.exp(-m / temperature)) for m in margins) / 2000
    wide = spread_margin_temperature(temperature, spread)
    assert 1 / (1 + math.exp(-margin / wide)) == pytest.approx(mean, abs=0.01)
    assert 1 / (1 + math.exp(-margin / temperature)) > mean + 0.1, "without the spread it is too confident"


def test_uncertainty_is_the_weighted_mean_of_the_nearest() -> None:
    candidate = unit_rows(np.array([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=np.float32))
    found = expected_uncertainty(candidate, AXES, [0.4, 0.2, 0.9, 0.1], neighbours=2)
    # The nearest ones of (3, 1) are the first two axes, with similarities in the ratio 3 to 1: (3 * 0.4 + 1 * 0.2) / 4.
    # The last candidate is the last axis; its other neighbour has similarity 0, and so the weight of the floor.
    assert found == pytest.approx([0.35, 0.1], abs=1e-5)
    assert expected_uncertainty(-AXES[:1], AXES[:1], [0.3]) == pytest.approx([0.3])
    many = expected_uncertainty(np.repeat(AXES[:1], 5000, axis=0), AXES, [0.4, 0.2, 0.9, 0.1], neighbours=1)
    assert many == pytest.approx([0.4] * 5000)
    assert expected_uncertainty(AXES[:0], AXES, [0.4, 0.2, 0.9, 0.1]).size == 0


def test_numbers_must_agree_and_be_finite() -> None:
    with pytest.raises(ValueError, match="got 4 vectors, 1 uncertainties and 10 neighbours"):
        expected_uncertainty(AXES, AXES, [0.1])
    with pytest.raises(ValueError, match="got 0 vectors, 0 uncertainties"):
        expected_uncertainty(AXES, AXES[:0], [])
    with pytest.raises(ValueError, match="weights must be at least 0"):
        farthest_first(AXES, [1.0, 1.0, 1.0, -1.0], 2)
    with pytest.raises(ValueError, match="got 4 vectors and 1 weights"):
        farthest_first(AXES, [1.0], 2)


def test_candidates_are_chosen_by_weight_and_distance() -> None:
    x = unit_rows(np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], dtype=np.float32))
    # First the largest weight, row 1. Distances to it: 0.2, 0, 0.4, 1.8 -> products 0.18, 0, 0.32, 0.18: row 2.
    # Distances to both: 0.2, 0, 0, 1.0 -> products 0.18, 0, 0, 0.10: row 0. Then row 3: its nearest chosen one is row 2.
    assert farthest_first(x, [0.9, 1.0, 0.8, 0.1], 4) == [1, 2, 0, 3]
    assert farthest_first(x, [0.9, 1.0, 0.8, 0.1], 2) == [1, 2]


def test_known_vectors_and_equal_ones_are_not_chosen_again() -> None:
    rows = AXES[[0, 0, 1, 2]]
    assert farthest_first(rows, [1.0, 1.0, 0.5, 0.2], 9) == [0, 2, 3]
    assert farthest_first(rows, [1.0, 1.0, 0.5, 0.2], 9, known_SD=AXES[:2]) == [3]
    assert farthest_first(rows, [0.0] * 4, 9) == []
    assert farthest_first(AXES[:0], [], 3) == []


def test_the_examples_of_the_documentation() -> None:
    found = doctest.testmod(seed_recommendation)
    assert (found.failed, found.attempted > 0) == (0, True)
