"""Strengths of several policies from comparisons of pairs: the Bradley-Terry model.

Shapes: G comparisons (games), Q questions, K policies, M = Q + 2 with the two added pseudo-questions, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, percentile_interval

__all__ = ["Game", "bradley_terry", "maximum_likelihood"]

Floats = NDArray[np.float64]

RESAMPLES = 1000
HALF = 0.5
"""Wins added to each side of every compared pair; keeps the strength of a policy finite that won or lost all comparisons."""
ELO = 400 / np.log(10)
"""Points of the Elo scale per unit of log odds."""


@dataclass(frozen=True)
class Game:
    """A comparison of two policies on a question.

    Attributes:
        question: the question; comparisons on one question are dependent.
        first, second: numbers of the policies.
        score: score of the first: 1 for a win, 0.5 for a tie, 0 for a loss.
    """

    question: Hashable
    first: int
    second: int
    score: float


def bradley_terry(games: Sequence[Game], policies: int, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Figure]:
    """Estimate the strength of each policy on the Elo scale, with a 95 % interval.

    P(i beats j) = p_i / (p_i + p_j),   strength_i = 400 log10 p_i, with mean 0

    Bradley and Terry 1952 (https://doi.org/10.2307/2334029). 400 points are odds of 10 to 1. A tie is half a win for
    both. Half a win is added to both sides of every compared pair. For two policies this is Firth's bias-reduced estimate
    (Firth 1993, https://doi.org/10.1093/biomet/80.1.27), and it is finite if one of them won everything.

    The interval is a percentile bootstrap over questions: all comparisons on a question are drawn together, because they share
    replies. Two pseudo-questions on which the policies win in opposite order are drawn with the others, as in `mean_figure`:
    without them, there would be no uncertainty if one policy won everything. In simulations with three policies and 20 to 80
    questions the intervals contained the true strength in 88 % to 97 % of draws.

    Args:
        games: [G], the comparisons.
        policies: number K of policies.
        seed: seed of the bootstrap. Default: 0.
        resamples: number R of resamples, > 0. Default: 1000.

    Returns:
        [K] strengths; `n` is the number of questions on which the policy was compared. The value is None if some policies are
        not connected with the others by comparisons.

    Raises:
        ValueError: a score is outside [0, 1], or a number is not that of a policy.

    Example:
        >>> [round(figure.value, 1) for figure in bradley_terry([Game(q, 0, 1, 1.0) for q in range(9)], 2)]
        [255.8, -255.8]
    """
    wins_QKK = _wins(games, policies)
    played_KK = (wins_QKK + wins_QKK.transpose(0, 2, 1)).sum(0) > 0
    questions_K = (wins_QKK + wins_QKK.transpose(0, 2, 1)).sum(2).astype(bool).sum(0)
    if not _connected(played_KK):
        return [Figure(None, None, None, int(n)) for n in questions_K]
    value_K = _strengths(wins_QKK.sum(0)[None], played_KK)[0]
    order_KK = np.triu(played_KK, 1).astype(np.float64)
    wins_MKK = np.concatenate([wins_QKK, order_KK[None], order_KK.T[None]])
    drawn = len(wins_MKK)
    # Only the number of times that each question is drawn matters.
    counts_RM = np.random.default_rng(seed).multinomial(drawn, np.full(drawn, 1 / drawn), size=resamples)
    drawn_RK = _strengths(np.tensordot(counts_RM.astype(np.float64), wins_MKK, axes=1), played_KK)
    return [_figure(*one) for one in zip(value_K, drawn_RK.T, questions_K, strict=True)]


def maximum_likelihood(wins: Floats, *, tolerance: float = 1e-9, most: int = 10_000) -> Floats:
    """Fit Bradley-Terry models to tables of wins by the MM algorithm.

    p_i ← w_i / Σ_j (n_ij / (p_i + p_j)),   w_i = Σ_j wins_ij,   n_ij = wins_ij + wins_ji

    Hunter 2004, equation 3 (https://doi.org/10.1214/aos/1079120141).

    Args:
        wins: [R, K, K], wins of the policy of the row over that of the column, >= 0. Every policy has won something, and the
            policies are connected.
        tolerance: largest change of a log p in the last iteration.
        most: maximum number of iterations.

    Returns:
        [R, K] log p with mean 0.
    """
    games_RKK, won_RK = wins + wins.transpose(0, 2, 1), wins.sum(-1)
    log_p_RK = np.zeros_like(won_RK)
    for _ in range(most):
        p_RK = np.exp(log_p_RK)
        update_RK = np.log(won_RK / (games_RKK / (p_RK[:, :, None] + p_RK[:, None, :])).sum(-1))
        update_RK -= update_RK.mean(-1, keepdims=True)
        change, log_p_RK = float(np.abs(update_RK - log_p_RK).max()), update_RK
        if change < tolerance:
            break
    return np.asarray(log_p_RK, dtype=np.float64)


def _wins(games: Sequence[Game], policies: int) -> Floats:
    """Return the wins of each policy over each other one by question, [Q, K, K]."""
    place = {question: q for q, question in enumerate(dict.fromkeys(game.question for game in games))}
    wins_QKK = np.zeros((len(place), policies, policies))
    for game in games:
        if not 0 <= game.score <= 1:
            raise ValueError(f"scores must be in [0, 1], got {game.score}")
        if game.first == game.second or not (0 <= game.first < policies and 0 <= game.second < policies):
            raise ValueError(f"a game needs two different policies below {policies}, got {game.first} and {game.second}")
        wins_QKK[place[game.question], game.first, game.second] += game.score
        wins_QKK[place[game.question], game.second, game.first] += 1 - game.score
    return wins_QKK


def _strengths(wins_RKK: Floats, played_KK: NDArray[np.bool_]) -> Floats:
    return np.asarray(ELO * maximum_likelihood(wins_RKK + HALF * played_KK), dtype=np.float64)


def _connected(played_KK: NDArray[np.bool_]) -> bool:
    """Return whether every policy is connected with the first one by comparisons."""
    reached_K = np.arange(len(played_KK)) == 0
    for _ in played_KK:
        reached_K = reached_K | (played_KK & reached_K).any(-1)
    return bool(reached_K.all())


def _figure(value: float, drawn_R: Floats, n: int) -> Figure:
    low, high = percentile_interval(drawn_R)
    assert low is not None
    assert high is not None
    # The pseudo-questions are not in the value, so it may be outside by a little.
    return Figure(float(value), min(low, float(value)), max(high, float(value)), int(n))
