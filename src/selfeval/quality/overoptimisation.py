"""Over-optimisation curves: gain by the proxy and by gold over the KL (Gao et al. 2022, https://arxiv.org/abs/2210.10760).

d = √KL(π‖start) is the distance of the policy from the initial one. The proxy (the evaluator) is the training objective, gold
the intended one. With R the gain over the initial policy, the paper finds

    best of n              R(d) = d (α − β d)
    reinforcement          R(d) = d (α − β log d)

α is the initial rate of the gain, β the rate at which it is lost again. The gain is linear in both, so they are fitted by least
squares.

Shapes: N samples, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import booleans, finite

__all__ = ["GainCurve", "best_of_n", "best_of_n_kl", "fit_best_of_n", "fit_reinforcement", "logistic_fit"]

Floats = NDArray[np.float64]

_NEWTON_STEPS = 50
_RIDGE = 1e-3
"""Ridge that keeps the logistic fit finite if a threshold separates the samples perfectly."""


@dataclass(frozen=True)
class GainCurve:
    """A fitted curve: its two coefficients, and the root mean squared error of the points."""

    alpha: float
    beta: float
    rmse: float


def best_of_n_kl(n: int) -> float:
    """Return an upper bound on the KL of best-of-n sampling to the sampled distribution: log n − (n − 1) / n, in nats.

    The bound is exact if no two samples have equal scores. Stiennon et al. 2020, appendix G.3
    (https://arxiv.org/abs/2009.01325).

    Args:
        n: samples per question, >= 1.

    Raises:
        ValueError: n is not positive.

    Example:
        >>> best_of_n_kl(1)
        0.0
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Sequence[float], value: Sequence[float], n: int) -> float:
    """Compute the unbiased estimate of the value of the best of n samples by the proxy, from N >= n samples of one question.

    Σ_i C(i − 1, n − 1) / C(N, n) · value_i,   i = 1 ... N in ascending order of the proxy

    is the mean over all subsets of size n. Nakano et al. 2021, appendix I (https://arxiv.org/abs/2112.09332). Samples with
    equal proxy scores share their mean value.

    Args:
        proxy: [N], scores by which the best sample is chosen.
        value: [N], values to average: the proxy scores again, or gold.
        n: samples per subset, 1 <= n <= N.

    Raises:
        ValueError: the lengths differ, or n is not between 1 and N.

    Example:
        >>> best_of_n([0.1, 0.9], [0.0, 1.0], 2)
        1.0
    """
    if len(proxy) != len(value) or not 1 <= n <= len(proxy):
        raise ValueError(
            f"best of {n} needs equally many scores and values, at least {n} each, got {len(proxy)} and {len(value)}"
        )
    scores_N, order = np.asarray(proxy, dtype=np.float64), np.argsort(proxy, kind="stable")
    _, place_N = np.unique(scores_N, return_inverse=True)
    # Mean value of the samples with the same proxy score: which of them is chosen is chance.
    shared_N = np.bincount(place_N, weights=np.asarray(value, dtype=np.float64)) / np.bincount(place_N)
    total = math.comb(len(proxy), n)
    # The sample of rank i is the best of C(i - 1, n - 1) subsets; i counts from 0 here.
    weights_N = [math.comb(i, n - 1) / total for i in range(len(proxy))]
    return float(np.dot(weights_N, shared_N[place_N][order]))


def fit_best_of_n(distance: Sequence[float], gain: Sequence[float]) -> GainCurve:
    """Fit R(d) = d (α − β d) to points of best-of-n sampling.

    Args:
        distance: [P], d = √KL, > 0, in √nats; at least two different ones.
        gain: [P], R, what is gained over the start, any unit.

    Raises:
        ValueError: fewer than two distances, or one that is not positive.
    """
    d_P = _distances(distance)
    return _fit(d_P, -d_P * d_P, gain)


def fit_reinforcement(distance: Sequence[float], gain: Sequence[float]) -> GainCurve:
    """Fit R(d) = d (α − β log d) to points of a policy that is trained by reinforcement.

    Args:
        distance: [P], d = √KL, > 0, in √nats; at least two different ones.
        gain: [P], R, what is gained over the start, any unit.

    Raises:
        ValueError: fewer than two distances, or one that is not positive.
    """
    d_P = _distances(distance)
    return _fit(d_P, -d_P * np.log(d_P), gain)


def _distances(distance: Sequence[float]) -> Floats:
    d_P = np.asarray(distance, dtype=np.float64)
    if len(np.unique(d_P)) < 2 or not bool((d_P > 0).all()):
        raise ValueError(f"a fit needs at least two different distances, all above 0, got {list(distance)}")
    return d_P


def _fit(first_P: Floats, second_P: Floats, gain: Sequence[float]) -> GainCurve:
    columns, gain_P = np.stack([first_P, second_P], axis=1), np.asarray(gain, dtype=np.float64)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gain_P, rcond=None)
    return GainCurve(float(alpha), float(beta), float(np.sqrt(np.mean((columns @ [alpha, beta] - gain_P) ** 2))))


def logistic_fit(scores: Sequence[float], right: Sequence[bool]) -> tuple[float, float]:
    """Fit P(right) = σ(a s + b) (Platt scaling), which converts proxy scores into the units of gold.

    Maximum likelihood with a small ridge on the slope of the standardised scores, by Newton's method with step halving. The
    ridge keeps the optimum finite if a threshold separates the samples perfectly. Step halving makes the method converge from
    any start; a full Newton step would overshoot into saturated probabilities and a singular Hessian. Platt 1999,
    "Probabilistic outputs for support vector machines"; Lin, Lin and Weng 2007
    (https://doi.org/10.1007/s10994-007-5018-6) on the step.

    Args:
        scores: [N], finite.
        right: [N], gold of the same samples, booleans.

    Returns:
        (a, b); a = 0 if the scores or gold do not vary.

    Raises:
        ValueError: the lengths differ, there are no samples, a score is not finite, or a label is not a boolean.

    Example:
        >>> a, b = logistic_fit([-1.0] * 15 + [1.0], [False] * 15 + [True])
        >>> a > 0 and -a + b < 0 < a + b
        True
    """
    if len(scores) != len(right) or not len(scores):
        raise ValueError(f"a fit needs a gold label for each score, got {len(scores)} scores and {len(right)} labels")
    s_N, y_N = finite(scores, "scores"), np.asarray(booleans(right, "labels"), dtype=np.float64)
    # Smoothed, because the log-odds of a share of 0 or 1 are infinite.
    share = (y_N.sum() + 0.5) / (len(y_N) + 1)
    start = math.log(share / (1 - share))
    # Divide by the largest magnitude first: the square of 1e200 overflows.
    size = float(np.abs(s_N).max()) or 1.0
    centre, spread = float((s_N / size).mean()), float((s_N / size).std())
    if s_N.min() == s_N.max() or spread == 0 or y_N.min() == y_N.max():
        return 0.0, start
    slope, constant = _damped_newton((s_N / size - centre) / spread, y_N, start)
    # Back from standardised to raw scores.
    return slope / spread / size, constant - slope * centre / spread


def _damped_newton(x_N: Floats, y_N: Floats, start: float) -> tuple[float, float]:
    """Minimise `_loss` over slope and intercept."""
    w, ridge = np.array([0.0, start]), _RIDGE * len(y_N)
    for _ in range(_NEWTON_STEPS):
        p_N = _chance(w[0] * x_N + w[1])
        error_N, weight_N = p_N - y_N, p_N * (1 - p_N)
        gradient = np.array([error_N @ x_N + ridge * w[0], error_N.sum()])
        # The floor keeps the Hessian invertible if all probabilities are saturated.
        a, b, c = weight_N @ x_N**2 + ridge, weight_N @ x_N, weight_N.sum() + 1e-12
        step = np.array([c * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (a * c - b * b)
        old, scale = _loss(w, x_N, y_N), 1.0
        # Armijo condition: halve the step until the loss falls by a small part of what the gradient promises.
        while scale > 1e-9 and _loss(w - scale * step, x_N, y_N) > old - 1e-4 * scale * float(gradient @ step):
            scale /= 2
        if scale <= 1e-9 or float(np.abs(step).max()) < 1e-10:
            break
        w = w - scale * step
    return float(w[0]), float(w[1])


def _loss(w: Floats, x_N: Floats, y_N: Floats) -> float:
    """Compute the summed log loss in nats, with the ridge on the slope."""
    logits_N = w[0] * x_N + w[1]
    return float((np.logaddexp(0, logits_N) - y_N * logits_N).sum() + _RIDGE * len(y_N) * w[0] ** 2 / 2)


def _chance(logits_N: Floats) -> Floats:
    # tanh saturates for large logits; exp would overflow.
    return np.asarray(0.5 * (1 + np.tanh(logits_N / 2)), dtype=np.float64)
