"""Estimates from pairs that were not drawn uniformly, with the LURE weights of active testing.

Shapes: N pairs in the set, M of them drawn, K questions among these.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, finite, wilson_interval

__all__ = ["Share", "draw_probabilities", "labels_to_halve", "lure_weights", "weighted_share"]

Floats = NDArray[np.float64]

_MOST = 1e6
"""Upper limit of the factor by which the number of labels is raised."""


def draw_probabilities(weights: Sequence[float], uniform: float) -> Floats:
    """Compute the probability of each draw given the earlier ones, for an order drawn without replacement.

    q_m = u / (N − m + 1) + (1 − u) w_m / Σ_{j>=m} w_j

    Args:
        weights: [N], > 0, in the order of the draws.
        uniform: share u of uniform draws, in (0, 1].

    Raises:
        ValueError: a weight is not positive, or the share is not in (0, 1].

    Example:
        >>> draw_probabilities([3.0, 1.0], uniform=0.5).tolist()
        [0.625, 1.0]
    """
    w_N = finite(weights, "weights")
    if (w_N.size and w_N.min() <= 0) or not 0 < uniform <= 1:
        raise ValueError(f"weights must be positive and uniform in (0, 1], got {weights} and {uniform}")
    left_N = np.arange(w_N.size, 0, -1)
    return np.asarray(uniform / left_N + (1 - uniform) * w_N / np.cumsum(w_N[::-1])[::-1], dtype=np.float64)


def lure_weights(probabilities: Sequence[float], total: int) -> Floats:
    """Compute the weights with which the mean over the drawn pairs is an unbiased estimate of the mean over all pairs.

    v_m = 1 + (N − M) / (N − m) (1 / ((N − m + 1) q_m) − 1),   E[Σ_m v_m x_m / M] = Σ_i x_i / N

    The levelled unbiased risk estimator R_LURE of Farquhar et al. 2021 (https://arxiv.org/abs/2101.11665). With M = N every
    weight is 1.

    Args:
        probabilities: [M], q_m of each draw given the earlier ones, in (0, 1].
        total: number N of pairs, at least M.

    Raises:
        ValueError: there are more draws than pairs, or a probability is not in (0, 1].

    Example:
        >>> lure_weights([0.25, 0.25], 4).tolist()  # the second draw is less likely than one of three
        [1.0, 1.3333333333333333]
    """
    q_M = finite(probabilities, "probabilities")
    if q_M.size > total or (q_M.size and not 0 < q_M.min() <= q_M.max() <= 1 + 1e-12):
        raise ValueError(f"need at most {total} probabilities in (0, 1], got {q_M.size}: {probabilities}")
    if q_M.size == total:
        return np.ones(total)
    left_M = total - np.arange(1, q_M.size + 1)
    return np.asarray(1 + (total - q_M.size) / left_M * (1 / ((left_M + 1) * q_M) - 1), dtype=np.float64)


@dataclass(frozen=True)
class Share:
    """A weighted share.

    Attributes:
        figure: the share with its 95 % interval; `n` is the number of questions.
        effective: number of independent, equally weighted cases with an interval as wide.
    """

    figure: Figure
    effective: float


def weighted_share(credits: Sequence[float], weights: Sequence[float], questions: Sequence[Hashable]) -> Share:
    """Compute a weighted mean of credits with an interval that respects weights and questions.

    r = Σ v x / Σ v,   s² = K / (K − 1) Σ_k (Σ_{i in k} v_i (x_i − r))² / (Σ v)²,   n* = min(r (1 − r) / s², K)

    The interval is Wilson's with n* cases: Korn and Graubard 1998, "Confidence Intervals for Proportions With Small Expected
    Number of Positive Counts Estimated From Survey Data" (Survey Methodology 24), with Wilson's interval in place of the exact
    one. Credits that are all 0, all 1 or all equal have no measured variance: n* = (Σ_k V_k)² / Σ_k V_k², V_k = Σ_{i in k} v_i
    (Kish 1965).

    The denominator makes it an estimate for a part of the set, such as the pairs that people can decide: pairs outside of the
    part are left out. The interval treats questions as a sample of all questions that the run could have asked.

    Args:
        credits: [M], in [0, 1].
        weights: [M], >= 0, for example of `lure_weights`.
        questions: [M], the question of each pair.

    Raises:
        ValueError: the lengths differ, or a number is outside its range.

    Example:
        >>> weighted_share([1.0, 0.0], [3.0, 1.0], ["a", "b"]).figure.value
        0.75
    """
    x_M, v_M = finite(credits, "credits"), finite(weights, "weights")
    if not x_M.size == v_M.size == len(questions):
        raise ValueError(f"need equal lengths, got {x_M.size} credits, {v_M.size} weights and {len(questions)} questions")
    if x_M.size and (x_M.min() < 0 or x_M.max() > 1 or v_M.min() < 0):
        raise ValueError("credits must be in [0, 1] and weights at least 0")
    if not x_M.size or v_M.sum() == 0:
        return Share(Figure(None, None, None, 0), 0.0)
    place = {question: k for k, question in enumerate(dict.fromkeys(questions))}
    place_M = np.array([place[question] for question in questions])
    r = min(1.0, max(0.0, float((v_M * x_M).sum() / v_M.sum())))
    residual_K, weight_K = (np.bincount(place_M, part_M).astype(np.float64) for part_M in (v_M * (x_M - r), v_M))
    effective = _effective(r, residual_K, weight_K)
    return Share(Figure(r, *wilson_interval(r * effective, effective), len(place)), effective)


def _effective(r: float, residual_K: Floats, weight_K: Floats) -> float:
    count, total = residual_K.size, float(weight_K.sum())
    kish = total * total / float((weight_K**2).sum())
    if count < 2 or r in (0.0, 1.0) or float(np.abs(residual_K).max()) <= 1e-12 * total:
        return kish
    variance = count / (count - 1) * float((residual_K**2).sum()) / (total * total)
    return min(r * (1 - r) / variance, float(count))


def labels_to_halve(share: Share, labelled: int) -> int | None:
    """Compute how many further pairs halve the width of an interval, if they are like the labelled ones.

    The effective number of cases is assumed to grow in proportion to the number of labelled pairs.

    Args:
        share: a share.
        labelled: number of pairs that were labelled for it.

    Returns:
        The number of pairs; None without a value.

    Example:
        >>> labels_to_halve(Share(Figure(0.5, 0.4, 0.6, 96), 96.0), 96)  # about 3 * 96: the width is z / √(n + z²)
        300
    """
    value = share.figure.value
    if value is None or not share.effective:
        return None

    def width(factor: float) -> float:
        low, high = wilson_interval(value * share.effective * factor, share.effective * factor)
        return high - low

    low, high, half = 1.0, _MOST, width(1.0) / 2
    while high - low > 1e-6 * high:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if width(middle) > half else (low, middle)
    return math.ceil(round((high - 1) * labelled, 3))
