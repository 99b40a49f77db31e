from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from selfeval.quality.comparisons import FEWEST, Comparison, compare_paired, compare_with_level


def paired(both: int, wins: int, losses: int, neither: int) -> Comparison:
    ours = [1.0] * (both + wins) + [0.0] * (losses + neither)
    theirs = [1.0] * both + [0.0] * wins + [1.0] * losses + [0.0] * neither
    return compare_paired(ours, theirs)


def test_three_wins_and_a_tie_are_too_few_to_claim_anything() -> None:
    found = compare_with_level([1.0, 1.0, 1.0, 0.5])
    assert (found.wins, found.losses, found.p_value) == (3, 0, 0.25)
    assert found.finding == "too_few"


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "p_value", "finding"),
    # 2 / 2^k for k wins alone; for 1 of 9: 2 (1 + 9) / 2^9 = 0.0390625.
    [
        (4, 0, 20, 0.125, "unclear"),
        (5, 0, 195, 0.0625, "unclear"),
        (6, 0, 0, 0.03125, "better"),
        (0, 6, 0, 0.03125, "worse"),
        (6, 0, 194, 0.03125, "better"),
        (8, 1, 3, 0.0390625, "better"),
        (0, 0, 6, 1.0, "unclear"),
        (5, 0, 0, 0.0625, "too_few"),
    ],
)
def test_wins_and_losses_decide_and_ties_do_not(wins: int, losses: int, ties: int, p_value: float, finding: str) -> None:
    found = compare_with_level([1.0] * wins + [0.0] * losses + [0.5] * ties)
    assert (found.wins, found.losses, found.p_value, found.finding) == (wins, losses, p_value, finding)
    assert found.difference.n == wins + losses + ties


def test_a_clear_difference_is_found_where_the_two_intervals_overlap() -> None:
    # 96% against 95% of 1000: the separate Wilson intervals overlap widely, yet 10 wins to no loss are no accident.
    found = paired(950, 10, 0, 40)
    assert found.difference.value == pytest.approx(0.01)
    assert (found.test, found.finding) == ("mcnemar_exact", "better")
    assert found.p_value == pytest.approx(2 / 2**10)
    # The same two shares with 60 wins to 50 losses show nothing.
    assert paired(900, 60, 50, 0).finding == "unclear"


def test_sides_exchanged_exchange_the_finding() -> None:
    there, back = paired(50, 20, 4, 26), paired(50, 4, 20, 26)
    assert (there.finding, back.finding) == ("better", "worse")
    assert there.p_value == back.p_value
    assert back.difference.value == pytest.approx(-(there.difference.value or 0))


def test_chance_is_a_binomial_test_with_wilsons_interval() -> None:
    # 15 of 20: 2 * sum_{i<=5} C(20, i) / 2^20 = 2 * 21700 / 1048576. Wilson: (0.531300, 0.888138).
    found = compare_with_level([1.0] * 15 + [0.0] * 5)
    assert (found.test, found.p_value) == ("binomial_exact", pytest.approx(43400 / 1048576))
    assert (found.difference.ci_low, found.difference.ci_high) == pytest.approx((0.031300, 0.388138), abs=1e-5)
    assert found.finding == "better"


def test_half_credits_are_compared_by_their_signs() -> None:
    found = compare_paired([1.0] * 7 + [0.0], [0.5] * 7 + [0.5])
    assert (found.wins, found.losses, found.test) == (7, 1, "sign_exact")
    assert found.difference.value == pytest.approx((3.5 - 0.5) / 8)


def test_replies_to_one_question_are_one_case() -> None:
    # Ten replies to each of five questions, all won: fifty cases that would be claimed, and five questions that are not.
    questions = [name for name in "abcde" for _ in range(10)]
    found = compare_paired([1.0] * 50, [0.0] * 50, questions)
    assert (found.difference.n, found.wins, found.p_value) == (5, 5, 0.0625)
    assert found.finding == "too_few"
    assert compare_paired([1.0] * 50, [0.0] * 50).finding == "better"
    # A question's mean decides: two wins and a loss are one win; a win and a loss are a tie.
    mixed = compare_with_level([1.0, 1.0, 0.0, 1.0, 0.0], questions=["a", "a", "a", "b", "b"])
    assert (mixed.wins, mixed.losses, mixed.test) == (1, 0, "sign_exact")
    assert mixed.difference.value == pytest.approx((1 / 6 + 0) / 2)


def test_a_claim_needs_the_interval_on_the_side_of_the_test() -> None:
    # Many small wins and few large losses: the signs say better, the mean says worse; neither is claimed.
    found = compare_paired([0.5] * 12 + [0.0] * 3, [0.0] * 12 + [1.0] * 3)
    assert found.p_value is not None
    assert found.p_value < 0.05
    assert found.finding == "unclear"


def test_nothing_compared_is_no_finding() -> None:
    found = compare_paired([], []).as_json()
    assert found == {
        "difference": {"value": None, "ci_low": None, "ci_high": None, "n": 0},
        "wins": 0,
        "losses": 0,
        "p_value": None,
        "test": "mcnemar_exact",
        "finding": "too_few",
    }


def test_wrong_credits_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        compare_paired([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got \[1.5\]"):
        compare_with_level([1.5])
    with pytest.raises(ValueError, match="must be in"):
        compare_with_level([math.nan])
    with pytest.raises(ValueError, match="2 cases and 1 questions"):
        compare_with_level([1.0, 0.0], questions=["a"])


DRAWS = 2000
SIMULATION_ERROR = 3 * math.sqrt(0.05 * 0.95 / DRAWS)

NULLS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "no ties": ((1.0, 0.0), (0.5, 0.5)),
    "half ties": ((1.0, 0.5, 0.0), (0.25, 0.5, 0.25)),
    "mostly ties": ((1.0, 0.5, 0.0), (0.05, 0.9, 0.05)),
}


def _claims(compare: Callable[[Any], Comparison], drawn_DN: NDArray[Any]) -> int:
    """In how many draws a difference is claimed. Their order decides nothing, so equal draws are compared once."""
    rows, counts = np.unique(np.sort(drawn_DN, axis=1), axis=0, return_counts=True)
    claims = [compare(row.tolist()).finding in ("better", "worse") for row in rows]
    return int(counts @ np.array(claims))


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("n", [4, 5, 6, 7, 8, 10, 13, 20, 32, 50])
def test_without_a_difference_one_is_claimed_in_at_most_five_percent_of_draws(n: int, null: str) -> None:
    # Overlapping intervals claimed one in 12% of draws at n = 5.
    scores, chances = NULLS[null]
    rng = np.random.default_rng(n)
    claims = _claims(compare_with_level, rng.choice(scores, size=(DRAWS, n), p=chances))
    assert claims / DRAWS <= 0.05 + SIMULATION_ERROR
    assert n >= FEWEST or claims == 0


@pytest.mark.parametrize("n", [4, 6, 10, 20, 50])
def test_two_rules_of_equal_accuracy_are_told_apart_in_at_most_five_percent_of_draws(n: int) -> None:
    # Right together 40%, each alone 20%, both wrong 20%; and half credits with a mean of 0 but unequal signs.
    rng, cells = np.random.default_rng(n), np.array([(1, 1), (1, 0), (0, 1), (0, 0)], dtype=float)
    both = rng.choice(4, size=(DRAWS, n), p=[0.4, 0.2, 0.2, 0.2])
    uneven = rng.choice([0.75, 0.5, 0.0], size=(DRAWS, n), p=[0.4, 0.4, 0.2])
    paired = _claims(lambda row: compare_paired(*(cells[row].T.tolist())), both)
    assert max(paired, _claims(compare_with_level, uneven)) / DRAWS <= 0.05 + SIMULATION_ERROR


@pytest.mark.parametrize("questions", [6, 12, 50])
def test_clusters_do_not_add_false_claims(questions: int) -> None:
    # Four replies of a question, mostly alike: a coin per question, of which each reply strays one time in ten.
    rng, names = np.random.default_rng(questions), np.repeat(np.arange(questions), 4).tolist()
    claims = 0
    for _ in range(DRAWS):
        coin_N = np.repeat(rng.integers(0, 2, size=questions), 4)
        scores = np.where(rng.random(4 * questions) < 0.1, 1 - coin_N, coin_N).astype(float).tolist()
        claims += compare_with_level(scores, questions=names).finding in ("better", "worse")
    assert claims / DRAWS <= 0.05 + SIMULATION_ERROR
