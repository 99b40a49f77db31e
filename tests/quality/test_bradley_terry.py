"""Bradley-Terry strengths: closed forms, the equations of the maximum, and the coverage of the interval in simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selfeval.quality.bradley_terry import ELO, Game, bradley_terry, maximum_likelihood
from selfeval.quality.statistics import Figure


def _values(figures: list[Figure]) -> list[float]:
    return [figure.known for figure in figures]


def test_two_policies_have_firths_log_odds() -> None:
    # 6 wins and 3 losses: log odds (6 + ½) / (3 + ½), of which each policy has half.
    games = [Game(q, 0, 1, 1.0 if q < 6 else 0.0) for q in range(9)]
    expected = 400 * math.log10(6.5 / 3.5) / 2
    assert _values(bradley_terry(games, 2)) == pytest.approx([expected, -expected])
    # The order in which a pair is given does not matter.
    turned = [Game(game.question, 1, 0, 1 - game.score) for game in games]
    assert _values(bradley_terry(turned, 2)) == pytest.approx([expected, -expected])


def test_at_the_maximum_every_policy_wins_as_often_as_expected() -> None:
    wins_KK = np.array([[0.0, 7, 4, 1], [3, 0, 6, 2], [2, 1, 0, 5], [4, 0, 3, 0]])
    log_p_K = maximum_likelihood(wins_KK[None])[0]
    expected_KK = (wins_KK + wins_KK.T) / (1 + np.exp(log_p_K[None, :] - log_p_K[:, None]))
    assert expected_KK.sum(1) == pytest.approx(wins_KK.sum(1), abs=1e-6)
    assert log_p_K.mean() == pytest.approx(0, abs=1e-12)


def test_all_wins_and_all_ties_are_finite_and_uncertain() -> None:
    won = bradley_terry([Game(q, 0, 1, 1.0) for q in range(20)], 2)
    low, high = won[0].ci_low, won[0].ci_high
    assert low is not None
    assert high is not None
    assert 0 < low < won[0].known < high < 400
    tied = bradley_terry([Game(q, 0, 1, 0.5) for q in range(20)], 2)[0]
    assert tied.value == pytest.approx(0)
    assert tied.ci_low is not None
    assert tied.ci_low < -1


def test_policies_without_a_common_comparison_have_no_strength() -> None:
    games = [Game(q, 0, 1, 1.0) for q in range(5)] + [Game(q, 2, 3, 1.0) for q in range(3)]
    figures = bradley_terry(games, 4)
    assert [figure.value for figure in figures] == [None] * 4
    assert [figure.n for figure in figures] == [5, 5, 3, 3]
    assert None not in [figure.value for figure in bradley_terry([*games, Game(9, 1, 2, 0.5)], 4)]


@pytest.mark.parametrize("game", [Game(0, 0, 1, 1.5), Game(0, 0, 0, 1.0), Game(0, 0, 2, 1.0)])
def test_impossible_games_are_refused(game: Game) -> None:
    with pytest.raises(ValueError, match=r"scores must be in|two different policies"):
        bradley_terry([game], 2)


def _drawn(rng: np.random.Generator, strengths: list[float], questions: int) -> list[Game]:
    """Games whose questions have four equal copies: 4 comparisons of each pair, dependent within the question."""
    games = []
    for q in range(questions):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            score = float(rng.random() < 1 / (1 + math.exp((strengths[j] - strengths[i]) / ELO)))
            games += [Game(q, i, j, score)] * 4
    return games


def test_the_interval_contains_the_truth_when_comparisons_of_a_question_are_dependent() -> None:
    rng, truth, draws = np.random.default_rng(3), [120.0, 0.0, -120.0], 40
    clustered = single = 0
    for _ in range(draws):
        games = _drawn(rng, truth, 40)
        alone = [Game(number, game.first, game.second, game.score) for number, game in enumerate(games)]
        for found, hits in ((bradley_terry(games, 3, resamples=150), True), (bradley_terry(alone, 3, resamples=150), False)):
            covered = sum(f.ci_low <= t <= f.ci_high for f, t in zip(found, truth, strict=True))  # type: ignore[operator]
            clustered, single = (clustered + covered, single) if hits else (clustered, single + covered)
    # 120 intervals of 95 %; three standard errors are 6 points, or 10 if those of one draw were equal.
    assert clustered / (3 * draws) > 0.86
    # With each comparison as its own question, the intervals are half as wide: erf(1.96 / 2 / √2) = 67 %.
    assert single / (3 * draws) < 0.82
