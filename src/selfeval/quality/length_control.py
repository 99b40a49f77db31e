"""Length-controlled win rate: the estimated win rate if both replies had the same length.

Shapes: N comparisons, M = N + 2 with the two added pseudo-comparisons, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, bootstrap_interval, sigmoid

__all__ = ["RESAMPLES", "length_controlled_win_rate"]

Floats = NDArray[np.float64]

RESAMPLES = 500
"""Default number of bootstrap resamples."""
RIDGE = 0.1
"""Weight of φ²/2 relative to the summed log loss; keeps φ finite if length alone separates wins from losses."""


def length_controlled_win_rate(
    scores: Sequence[float], length_differences: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Figure:
    """Estimate the win rate at equal length: the length-controlled win rate of AlpacaEval 2.

    score ~ σ(θ + φ tanh(d / std(d))),   win rate = σ(θ)

    Judges prefer long replies, so a policy can win by length alone. The logistic regression models length by a separate term φ
    and predicts the win rate at a difference of 0. Dubois et al. 2024, section 3 (https://arxiv.org/abs/2404.04475).

    The paper's third term, the difficulty of each instruction, is left out. It is shared by all models of a leaderboard and
    can be separated from θ only if many models answer the same instructions; here there is one pair of policies with one
    comparison per question.

    Args:
        scores: [N] scores of the first side: 1 for a win, 0.5 for a tie, 0 for a loss (or any number in [0, 1], such as the
            mean of two orders).
        length_differences: [N] length of the first side's reply minus that of the other, in tokens or characters, finite.
        seed: seed of the bootstrap. Default: 0.
        resamples: number R of bootstrap resamples, > 0. Default: 500.

    Returns:
        σ(θ) with a 95 % percentile bootstrap interval; the plain win rate if lengths do not vary. One win and one loss at equal
        length are added to each resample, as in `mean_figure`: without them the bootstrap would find no uncertainty if there
        are only few wins, or only ties. None without comparisons.

    Raises:
        ValueError: the lengths of the inputs differ, a score is outside [0, 1], or a difference is not finite.
    """
    scores_N, x_N = _checked_scores(scores), _squashed(length_differences)
    if scores_N.size != x_N.size:
        raise ValueError(f"scores and length differences must have equal lengths, got {scores_N.size} and {x_N.size}")
    if scores_N.size == 0:
        return Figure(None, None, None, 0)
    # The two pseudo-comparisons enter the bootstrap only, not the value below.
    y_M, x_M = np.append(scores_N, (0.0, 1.0)), np.append(x_N, (0.0, 0.0))
    low, high = bootstrap_interval(
        lambda index_RM: _win_rates(y_M[index_RM], x_M[index_RM]), y_M.size, seed=seed, resamples=resamples
    )
    value = float(_win_rates(scores_N[None], x_N[None])[0])
    assert low is not None
    assert high is not None
    return Figure(value, min(low, value), max(high, value), scores_N.size)


def _win_rates(y_RN: Floats, x_RN: Floats) -> Floats:
    theta_R, _ = _fit(y_RN, x_RN)
    raw_R = y_RN.mean(-1)
    # If one side won all comparisons of a resample, the optimum is at θ = ± infinity.
    return np.where((raw_R == 0) | (raw_R == 1), raw_R, sigmoid(theta_R))


def _fit(y_RN: Floats, x_RN: Floats) -> tuple[Floats, Floats]:
    """Fit R ridge logistic regressions at once by Newton's method, with steps clipped to length 1 against overshooting."""
    theta_R, phi_R = np.zeros(len(y_RN)), np.zeros(len(y_RN))
    for _ in range(60):
        p_RN = sigmoid(theta_R[:, None] + phi_R[:, None] * x_RN)
        error_RN, weight_RN = p_RN - y_RN, p_RN * (1 - p_RN)
        # Gradient of the log loss plus RIDGE φ²/2; θ, the win rate at equal length, has no ridge.
        slope_theta_R, slope_phi_R = error_RN.sum(-1), (error_RN * x_RN).sum(-1) + RIDGE * phi_R
        # 1e-9 keeps the determinant positive where a resample is won entirely and its weights vanish.
        a_R, b_R, c_R = weight_RN.sum(-1) + 1e-9, (weight_RN * x_RN).sum(-1), (weight_RN * x_RN**2).sum(-1) + RIDGE
        # The inverse of the 2 x 2 Hessian [[a, b], [b, c]], written out for R fits at once.
        step_theta_R = (c_R * slope_theta_R - b_R * slope_phi_R) / (a_R * c_R - b_R**2)
        step_phi_R = (a_R * slope_phi_R - b_R * slope_theta_R) / (a_R * c_R - b_R**2)
        length_R = np.maximum(1, np.hypot(step_theta_R, step_phi_R))
        theta_R, phi_R = theta_R - step_theta_R / length_R, phi_R - step_phi_R / length_R
        if max(abs(step_theta_R).max(), abs(step_phi_R).max()) < 1e-12:
            break
    return theta_R, phi_R


def _squashed(length_differences: Sequence[float]) -> Floats:
    d_N = np.asarray(length_differences, dtype=np.float64)
    if not np.isfinite(d_N).all():
        raise ValueError("every length difference must be finite, got NaN or infinity")
    # Compared exactly: the std of equal numbers can be 1e-17, and dividing by it would invent a difference.
    varies = d_N.size > 0 and d_N.min() < d_N.max()
    return np.tanh(d_N / d_N.std()) if varies else np.zeros_like(d_N)


def _checked_scores(scores: Sequence[float]) -> Floats:
    scores_N = np.asarray(scores, dtype=np.float64)
    if not ((scores_N >= 0) & (scores_N <= 1)).all():
        raise ValueError(f"scores must be in [0, 1], got {scores_N.min()} to {scores_N.max()}")
    return scores_N
