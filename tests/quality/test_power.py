"""The number of questions for a claim, against simulations of the claim itself."""

from __future__ import annotations

import numpy as np
import pytest

from selfeval.quality.comparisons import FEWEST, compare_with_level
from selfeval.quality.power import questions_needed


def _outcomes(wins: float, losses: float) -> list[float]:
    """Differences with these shares of wins and losses."""
    won, lost = round(100 * wins), round(100 * losses)
    return [1.0] * won + [-1.0] * lost + [0.0] * (100 - won - lost)


@pytest.mark.parametrize(("wins", "losses"), [(0.3, 0.1), (0.6, 0.4)])
def test_the_difference_is_claimed_in_four_of_five_simulations(wins: float, losses: float) -> None:
    needed, rng, draws = questions_needed(_outcomes(wins, losses)), np.random.default_rng(0), 200
    assert needed is not None
    shares = [wins, 1 - wins - losses, losses]
    claimed = [
        compare_with_level(rng.choice([1.0, 0.5, 0.0], p=shares, size=needed).tolist()).finding == "better"
        for _ in range(draws)
    ]
    # The standard error of 200 draws is 3 points.
    assert sum(claimed) / draws == pytest.approx(0.8, abs=0.08)


def test_the_formula_without_ties() -> None:
    # δ = 0.2, ψ = 1: ((1.96 + 0.8416 · √0.9600) / 0.2)² + 5 = 193.9 + 5; with 1.2816 for 0.8416, 258.5 + 5.
    assert questions_needed(_outcomes(0.6, 0.4)) == 199
    assert questions_needed(_outcomes(0.4, 0.6)) == 199
    assert questions_needed(_outcomes(0.6, 0.4), power=0.9) == 264


def test_no_difference_has_no_sample_size_and_a_large_one_needs_the_fewest_questions() -> None:
    assert questions_needed([]) is None
    assert questions_needed([1.0, -1.0, 0.0]) is None
    assert questions_needed([1.0] * 10) == FEWEST


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"differences must be in \[-1, 1\]"):
        questions_needed([2.0])
    with pytest.raises(ValueError, match="power must be between 0 and 1"):
        questions_needed([1.0], power=1.0)
