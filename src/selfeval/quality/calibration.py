"""Does a confidence of 0.8 mean right 8 times in 10, and what is gained by answering only when sure?

Shapes: N cases. `confidence` is what the model claimed, `correct` what happened (True/False, or a soft label in [0,
1]). A measure of no cases is None: unscored is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Binning",
    "aurc",
    "brier_score",
    "expected_calibration_error",
    "fit_temperature",
    "reliability_bins",
    "risk_coverage",
]

Binning = Literal["equal_mass", "equal_width"]
Floats = NDArray[np.float64]

TEMPERATURE_RANGE = (1e-2, 1e2)
"""Bounds of a fitted temperature; separable labels would ask for 0, inverted ones for infinity."""


def reliability_bins(
    confidence: Sequence[float], correct: Sequence[float], *, bins: int = 10, scheme: Binning = "equal_mass"
) -> list[tuple[float, float, int]]:
    """Group cases by confidence and compare claim with outcome: the points of a reliability diagram.

    equal_mass   sorted by (confidence, position), cut into bins of equal size; the first N mod bins hold one more
    equal_width  bin k = (k / bins, (k + 1) / bins], confidence 0 in the first

    Equal mass is the default because confidences crowd near 1, where bins of equal width leave most bins empty. DeGroot
    and Fienberg 1983 (https://doi.org/10.2307/2987588); Nixon et al. 2019, section 3
    (https://arxiv.org/abs/1904.01685).

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] outcomes in [0, 1].
        bins: number of bins, > 0.
        scheme: how cases are grouped.

    Returns:
        (mean confidence, accuracy, number of cases) per non-empty bin, least confident first.

    Raises:
        ValueError: the lengths differ, a number is outside [0, 1], bins is not positive, or the scheme is unknown.
    """
    confidence_N, correct_N = _probabilities(confidence, correct)
    return [
        (float(confidence_N[group].mean()), float(correct_N[group].mean()), len(group))
        for group in _groups(confidence_N, bins, scheme)
        if len(group)
    ]


def expected_calibration_error(
    confidence: Sequence[float], correct: Sequence[float], *, bins: int = 15, scheme: Binning = "equal_mass"
) -> float | None:
    """Average the gap between claim and outcome over bins: Σ_b n_b / N · |mean confidence_b − accuracy_b|.

    Biased upwards when bins hold few cases: compare only figures with equal N and bins. Guo et al. 2017, eq. 3
    (https://arxiv.org/abs/1706.04599).

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] outcomes in [0, 1].
        bins: number of bins, > 0.
        scheme: see `reliability_bins`.

    Returns:
        In [0, 1], 0 = calibrated; None for no cases.

    Raises:
        ValueError: as in `reliability_bins`.
    """
    rows = reliability_bins(confidence, correct, bins=bins, scheme=scheme)
    if not rows:
        return None
    return sum(n * abs(claimed - accuracy) for claimed, accuracy, n in rows) / len(confidence)


def brier_score(confidence: Sequence[float], correct: Sequence[float]) -> float | None:
    """Average the squared error of a probability: mean (p − y)².

    A proper score: it rewards calibration and sharpness together.
    Brier 1950 (https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2).

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] outcomes in [0, 1].

    Returns:
        In [0, 1], 0 = perfect, 0.25 = always saying 0.5; None for no cases.

    Raises:
        ValueError: the lengths differ, or a number is outside [0, 1].
    """
    confidence_N, correct_N = _probabilities(confidence, correct)
    return float(np.square(confidence_N - correct_N).mean()) if confidence_N.size else None


def risk_coverage(confidence: Sequence[float], correct: Sequence[float], *, points: int = 20) -> list[tuple[float, float]]:
    """Trace what abstention buys: the error rate among the most confident share of the cases, for growing shares.

    At coverage c the ⌈c N⌉ most confident cases are answered (ties by position), risk = their error rate. Geifman and
    El-Yaniv 2017 (https://arxiv.org/abs/1705.08500).

    Args:
        confidence: [N] any finite score; only its order matters.
        correct: [N] outcomes in [0, 1].
        points: number of coverages asked for, k / points for k = 1 ... points; > 0.

    Returns:
        (coverage, risk) with the coverage that was reached, strictly rising to 1; fewer than `points` when N is
        smaller, empty for no cases.

    Raises:
        ValueError: the lengths differ, a score is not finite, an outcome is outside [0, 1], or points is not positive.
    """
    if points <= 0:
        raise ValueError(f"points must be positive, got {points}")
    risk_N = _risks(confidence, correct)
    n = risk_N.size
    answered = sorted({-(-k * n // points) for k in range(1, points + 1)} - {0})
    return [(count / n, float(risk_N[count - 1])) for count in answered]


def aurc(confidence: Sequence[float], correct: Sequence[float]) -> float | None:
    """Average the risk over all coverages: (1 / N) Σ_k risk of the k most confident.

    One number for a risk-coverage curve. Geifman et al. 2019, section 3 (https://arxiv.org/abs/1805.08206).

    Args:
        confidence: [N] any finite score; only its order matters, ties by position.
        correct: [N] outcomes in [0, 1].

    Returns:
        In [0, 1], lower is better, the overall error rate for a random order; None for no cases.

    Raises:
        ValueError: as in `risk_coverage`.
    """
    risk_N = _risks(confidence, correct)
    return float(risk_N.mean()) if risk_N.size else None


def fit_temperature(logits: Sequence[float], labels: Sequence[float]) -> float:
    """Find the one temperature T > 0 that makes σ(logit / T) fit the labels best, by log loss.

    min_T Σ log(1 + e^{z/T}) − y z/T;   its derivative in 1/T is Σ z (σ(z/T) − y), which only rises with 1/T: bisection
    finds the zero.

    T > 1 = the logits were overconfident. The order of cases never changes. Guo et al. 2017, section 4.2
    (https://arxiv.org/abs/1706.04599).

    Args:
        logits: [N], N > 0, log-odds that the label is 1, finite.
        labels: [N], in [0, 1]; soft labels are allowed.

    Returns:
        T within TEMPERATURE_RANGE (an end when the optimum lies outside); 1 when every logit is 0 and any T fits alike.

    Raises:
        ValueError: no cases, the lengths differ, a logit is not finite, or a label is outside [0, 1].
    """
    logits_N, labels_N = _scores_and_outcomes(logits, labels)
    if logits_N.size == 0:
        raise ValueError("fitting a temperature needs at least one case")
    if not logits_N.any():
        return 1.0
    low, high = (math.log(bound) for bound in TEMPERATURE_RANGE)
    for _ in range(100):
        middle = (low + high) / 2
        # <= 0: separable labels want T = 0, and there the sigmoid saturates and the slope rounds to 0.
        too_hot = logits_N @ (_sigmoid(logits_N * math.exp(-middle)) - labels_N) <= 0
        low, high = (low, middle) if too_hot else (middle, high)
    return math.exp((low + high) / 2)


def _groups(confidence_N: Floats, bins: int, scheme: Binning) -> list[NDArray[np.int64]]:
    if bins <= 0:
        raise ValueError(f"bins must be positive, got {bins}")
    if scheme == "equal_mass":
        return list(np.array_split(np.argsort(confidence_N, kind="stable"), bins))
    if scheme == "equal_width":
        bin_N = np.searchsorted(np.arange(1, bins) / bins, confidence_N, side="left")
        return [np.flatnonzero(bin_N == k) for k in range(bins)]
    raise ValueError(f"scheme must be 'equal_mass' or 'equal_width', got {scheme!r}")


def _risks(confidence: Sequence[float], correct: Sequence[float]) -> Floats:
    confidence_N, correct_N = _scores_and_outcomes(confidence, correct)
    errors_N = 1 - correct_N[np.argsort(-confidence_N, kind="stable")]
    return np.asarray(np.cumsum(errors_N) / np.arange(1, errors_N.size + 1), dtype=np.float64)


def _probabilities(confidence: Sequence[float], correct: Sequence[float]) -> tuple[Floats, Floats]:
    confidence_N, correct_N = _scores_and_outcomes(confidence, correct)
    _check_unit_interval(confidence_N, "a confidence")
    return confidence_N, correct_N


def _scores_and_outcomes(scores: Sequence[float], outcomes: Sequence[float]) -> tuple[Floats, Floats]:
    scores_N, outcomes_N = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if scores_N.shape != outcomes_N.shape:
        raise ValueError(f"each case needs a score and an outcome, got {scores_N.size} and {outcomes_N.size}")
    if not np.isfinite(scores_N).all():
        raise ValueError("every score must be finite, got NaN or infinity")
    _check_unit_interval(outcomes_N, "an outcome")
    return scores_N, outcomes_N


def _check_unit_interval(values_N: Floats, name: str) -> None:
    outside = values_N[~((values_N >= 0) & (values_N <= 1))]
    if outside.size:
        raise ValueError(f"{name} must be in [0, 1], got {outside[:5].tolist()}")


def _sigmoid(x_N: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x_N / 2)), dtype=np.float64)
