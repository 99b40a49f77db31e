"""The order in which people see the pairs: the most informative ones early, and every pair with a known probability.

Labelling only the doubtful pairs would make the evaluator look worse than it is. The order is therefore drawn at random, and
the estimates correct for the probabilities of the draws (`selfeval.labelling.weights`). It depends on a seed and on the pairs,
never on labels, and is the same for all raters, who therefore label the same pairs.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from selfeval.labelling.pairs import LabelPair
from selfeval.quality.statistics import sigmoid
from selfeval.records import VerdictState

__all__ = ["UNIFORM", "Draw", "Preference", "confidence_of", "draw_queue", "expected_error", "is_turned", "training_queue"]

Preference = Literal["uncertain", "central", "both"]
"""Pairs that come early: those on which the evaluator or the judge is probably wrong, pairs of typical questions, or both."""

UNIFORM = 0.5
"""Share of the draws in which every remaining pair has the same probability."""
_LEAST = 1e-6
"""Floor of an error or a density. Its logarithm is finite; a pair below it is drawn by the uniform part."""
_FIRST = (VerdictState.UNSURE, VerdictState.TIE, VerdictState.UNPARSABLE, VerdictState.KEPT)
"""Training pairs in the order of the judge's states: a label adds most where the judge gave none."""


@dataclass(frozen=True)
class Draw:
    """A pair at its place in the queue.

    Attributes:
        pair: the pair.
        weight: expected information, up to a factor, > 0.
        rank: place of the pair in the uniform order, from 0.
        uniform: whether it was drawn from the uniform order.
    """

    pair: LabelPair
    weight: float
    rank: int
    uniform: bool


def confidence_of(margin: float, temperature: float) -> float:
    """Return the evaluator's confidence in the reply that it prefers, sigmoid(|margin| / temperature), in [0.5, 1]."""
    return sigmoid(abs(margin) / temperature)


def expected_error(pair: LabelPair, temperature: float) -> float:
    """Return the probability that the evaluator or the judge is wrong, as far as they know.

    If they prefer different replies, one of them is wrong: 1. Otherwise it is 1 − confidence of the less sure one. A judge
    without a verdict has confidence 0.5.

    Args:
        pair: a pair with a margin.
        temperature: temperature of the evaluator's confidence, > 0.
    """
    margin, preference = pair.margin or 0.0, (pair.probability if pair.probability is not None else 0.5) - 0.5
    if margin * preference < 0:
        return 1.0
    return 1.0 - min(confidence_of(margin, temperature), 0.5 + abs(preference))


def draw_queue(
    pairs: Sequence[LabelPair],
    temperature: float,
    seed: int,
    prefer: Preference = "uncertain",
    densities: Mapping[str, float] | None = None,
) -> list[Draw]:
    """Draw the order of the pairs without replacement.

    Each draw is uniform over the remaining pairs with probability `UNIFORM`, otherwise pair i has probability w_i / Σ_j w_j
    with w_i = √p_i and the expected error p_i. For errors x of 0 or 1 this minimises Σ_i E[x_i²] / w_i, the variance of an
    importance-weighted mean. Sampling by the expected loss is active testing: Kossen et al. 2021
    (https://arxiv.org/abs/2103.05331). The uniform share bounds the weights of the estimates.

    Central pairs have w_i = d_i, the density of their question, and both together w_i = √p_i d_i. The estimates remain
    unbiased, because the probabilities of all draws are known, but their intervals become wider.

    Both are taken from fixed random orders: Gumbel keys log w_i + g_i sort the pairs as draws in proportion to w do (Kool et
    al. 2019, https://arxiv.org/abs/1903.06059).

    Args:
        pairs: all pairs of the set that the estimates are about.
        temperature: temperature of the evaluator's confidence, > 0.
        seed: seed of the order.
        prefer: pairs that come early. Default: `uncertain`.
        densities: Optional. Density of each question by id; needed to prefer central pairs. Default: none.

    Raises:
        ValueError: central pairs are preferred, and there are no densities.
    """
    if prefer != "uncertain" and densities is None:
        raise ValueError(f"prefer={prefer} needs the densities of the questions")
    rng = random.Random(f"{seed}/labels")
    weights = [_weight(pair, temperature, prefer, densities or {}) for pair in pairs]
    uniform = rng.sample(range(len(pairs)), len(pairs))
    keys = [math.log(weight) - math.log(-math.log(rng.uniform(1e-12, 1.0 - 1e-12))) for weight in weights]
    informed = sorted(range(len(pairs)), key=lambda i: -keys[i])
    rank = {place: number for number, place in enumerate(uniform)}
    orders = {True: iter(uniform), False: iter(informed)}
    drawn: dict[int, bool] = {}
    while len(drawn) < len(pairs):
        coin = rng.random() < UNIFORM
        drawn[_next_new(orders[coin], drawn)] = coin
    return [Draw(pairs[i], weights[i], rank[i], coin) for i, coin in drawn.items()]


def _weight(pair: LabelPair, temperature: float, prefer: Preference, densities: Mapping[str, float]) -> float:
    error = 1.0 if prefer == "central" else math.sqrt(max(expected_error(pair, temperature), _LEAST))
    return error if prefer == "uncertain" else error * max(densities[pair.question_id], _LEAST)


def _next_new(order: Iterator[int], drawn: dict[int, bool]) -> int:
    return next(place for place in order if place not in drawn)


def training_queue(pairs: Sequence[LabelPair], seed: int) -> list[LabelPair]:
    """Return pairs of training questions: those that the judge was unsure of first, in random order.

    No estimate is made from their labels, so they need no probabilities.
    """
    rng = random.Random(f"{seed}/labels/training")
    shuffled = rng.sample(list(pairs), len(pairs))
    return sorted(shuffled, key=lambda pair: _FIRST.index(pair.state))


def is_turned(pair: LabelPair, rater: str, seed: int) -> bool:
    """Return whether a rater sees the second reply first: random, but the same whenever the pair is shown again."""
    text = "\0".join([str(seed), rater, *pair.key])
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 1
