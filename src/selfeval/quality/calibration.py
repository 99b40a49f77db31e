"""Calibration of confidences, and selective prediction: the risk when only confident cases are answered.

Shapes: N cases. `confidence` is the probability claimed by the model, `correct` the outcome (True/False, or a soft label in
[0, 1]). Without cases a measure is None, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, booleans, sigmoid

__all__ = [
    "BINS",
    "CASES_PER_BIN",
    "Binning",
    "aurc",
    "brier_score",
    "calibration_error",
    "expected_calibration_error",
    "fit_temperature",
    "reliability_bins",
    "risk_coverage",
]

Binning = Literal["equal_mass", "equal_width"]
Floats = NDArray[np.float64]

TEMPERATURE_RANGE = (1e-2, 1e2)
"""Bounds of a fitted temperature: its optimum is 0 for separable labels and infinity for inverted ones."""

BINS = 15
"""Maximum number of bins of a calibration error."""
CASES_PER_BIN = 10
_DRAWS = 1000
_HALVINGS = 16
"""Bisection steps for the strength of a miscalibration in [0, 1]; the result is accurate to 1e-5."""
_GRID = 400


def reliability_bins(
    confidence: Sequence[float], correct: Sequence[float], *, bins: int = 10, scheme: Binning = "equal_mass"
) -> list[tuple[float, float, int]]:
    """Bin cases by confidence and compare mean confidence with accuracy: the points of a reliability diagram.

    equal_mass   sorted by (confidence, position) and cut into bins of equal size; the first N mod bins have one more
    equal_width  bin k = (k / bins, (k + 1) / bins], with confidence 0 in the first bin

    Equal mass is the default because confidences cluster near 1, where most bins of equal width would be empty. DeGroot and
    Fienberg 1983 (https://doi.org/10.2307/2987588); Nixon et al. 2019, section 3 (https://arxiv.org/abs/1904.01685).

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] outcomes in [0, 1].
        bins: number of bins, > 0.
        scheme: binning scheme. Default: equal mass.

    Returns:
        (mean confidence, accuracy, number of cases) of each non-empty bin, in ascending order of confidence.

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
    confidence: Sequence[float], correct: Sequence[float], *, bins: int = BINS, scheme: Binning = "equal_mass"
) -> float | None:
    """Compute the plug-in expected calibration error: Σ_b n_b / N · |mean confidence_b − accuracy_b|.

    It is biased upwards if bins have few cases, so compare only figures with equal N and bins. Guo et al. 2017, eq. 3
    (https://arxiv.org/abs/1706.04599).

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] outcomes in [0, 1].
        bins: number of bins, > 0.
        scheme: see `reliability_bins`.

    Returns:
        The error in [0, 1]; 0 is calibrated. None without cases.

    Raises:
        ValueError: as in `reliability_bins`.
    """
    rows = reliability_bins(confidence, correct, bins=bins, scheme=scheme)
    if not rows:
        return None
    return sum(n * abs(claimed - accuracy) for claimed, accuracy, n in rows) / len(confidence)


def calibration_error(confidence: Sequence[float], correct: Sequence[bool], *, bins: int = BINS, seed: int = 0) -> Figure:
    """Estimate the expected calibration error with bias correction and a 95 % interval that can contain 0.

    The plug-in error of `expected_calibration_error` sums |gap|, which is positive by noise alone. A bootstrap adds the noise a
    second time, so its interval covers a true error of 0 in less than half of the draws. Kumar et al. 2019
    (https://arxiv.org/abs/1909.10155) show the bias. Roelofs et al. 2022 (https://arxiv.org/abs/2012.08668) measure it by
    simulating outcomes, as this function does:

    value   the error at which the median of the simulated plug-in errors equals the measured one, with true gaps proportional
            to the measured ones; 0 if a calibrated model has an error this large in half of the draws
    low     measured error − 97.5 % quantile of the noise Σ_b n_b / N |accuracy_b − its expectation|. By the triangle
            inequality the noise cannot add more, whichever bins have the true gaps
    high    the largest error at which the measured one is above the 2.5 % quantile (test inversion, Carpenter 1999,
            https://doi.org/10.1111/1467-9868.00173), maximised over three distributions of the error over the bins:
            proportional to the measured gaps plus their standard errors, overconfidence in all bins, underconfidence in all

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] booleans.
        bins: maximum number of bins of equal mass. There are fewer if a bin would have fewer than 10 cases, and equal
            confidences share a bin. Default: 15.
        seed: seed of the simulation. Default: 0.

    Returns:
        The error in [0, 1]; None without cases.

    Raises:
        ValueError: the lengths differ, a confidence is outside [0, 1], or an outcome is not a boolean.

    Example:
        >>> calibration_error([0.75] * 40, [True] * 30 + [False] * 10).value
        0.0
    """
    confidence_N, correct_N = _probabilities(confidence, booleans(correct, "outcomes"))
    if confidence_N.size == 0:
        return Figure(None, None, None, 0)
    groups = _whole_groups(confidence_N, max(1, min(bins, confidence_N.size // CASES_PER_BIN)))
    claimed_B = np.array([confidence_N[group].mean() for group in groups])
    accuracy_B = np.array([correct_N[group].mean() for group in groups])
    plug_in = _PlugIn(claimed_B, accuracy_B, np.array([len(group) for group in groups]), seed)
    value, low, high = plug_in.value(), plug_in.low(), plug_in.high()
    # Value and bounds come from different computations, so they are put in order.
    return Figure(value, min(low, value), max(high, value), confidence_N.size)


@dataclass(frozen=True)
class _PlugIn:
    """A measured plug-in error, and plug-in errors of outcomes simulated with a known error.

    Attributes:
        claimed_B: mean confidence of each bin.
        accuracy_B: measured accuracy of each bin.
        count_B: number of cases in each bin.
        seed: seed of the simulation. It is the same for all errors, which are thus compared on common random numbers; the
            bisection needs a simulated quantile that does not jump.
    """

    claimed_B: Floats
    accuracy_B: Floats
    count_B: NDArray[np.int64]
    seed: int

    def value(self) -> float:
        gap_B = self.claimed_B - self.accuracy_B
        if self.measured == 0:
            return 0.0
        return self._bound(0.5, gap_B / np.abs(gap_B).max(), np.less)

    def low(self) -> float:
        return max(0.0, self.measured - max(self._noise(self.claimed_B), self._noise(self._smoothed_B)))

    def high(self) -> float:
        gap_B, even_B = self.claimed_B - self.accuracy_B, np.ones_like(self.claimed_B)
        errors_B = np.sqrt(self._smoothed_B * (1 - self._smoothed_B) / self.count_B)
        # Bins may have larger gaps than measured; a gap of 0 has no sign and counts as overconfident.
        enlarged_B = np.where(gap_B < 0, -1.0, 1.0) * (np.abs(gap_B) + errors_B)
        return max(self._bound(0.025, way_B, np.less_equal) for way_B in (enlarged_B, even_B, -even_B))

    @property
    def measured(self) -> float:
        return self._error(self.accuracy_B)

    @property
    def _smoothed_B(self) -> Floats:
        """Accuracies with one correct and one wrong case added, so no bin has a standard error of 0."""
        return np.asarray((self.accuracy_B * self.count_B + 1) / (self.count_B + 2), dtype=np.float64)

    def _bound(self, quantile: float, way_B: Floats, is_within: Callable[[float, float], object]) -> float:
        """Return the largest error, distributed over bins like `way_B`, whose simulated quantile is within the measured one."""
        # Strength 1 / max|way| moves the farthest bin by 1, the largest possible gap.
        low, high = 0.0, 1 / float(np.abs(way_B).max())

        def is_possible(strength: float) -> bool:
            true_B = np.clip(self.claimed_B - strength * way_B, 0.0, 1.0)
            errors_R = np.abs(self.claimed_B - self._drawn(true_B)) @ self.count_B / self.count_B.sum()
            return bool(is_within(float(np.quantile(errors_R, quantile)), self.measured))

        # A calibrated model would show an error this large as well, so there is no evidence of any.
        if not is_possible(low):
            return 0.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if is_possible(middle) else (low, middle)
        return self._error(np.clip(self.claimed_B - low * way_B, 0.0, 1.0))

    def _noise(self, true_B: Floats) -> float:
        noise_R = np.abs(true_B - self._drawn(true_B)) @ self.count_B / self.count_B.sum()
        return float(np.quantile(noise_R, 0.975))

    def _drawn(self, true_B: Floats) -> Floats:
        """Draw accuracies `[R, B]` of outcomes with these probabilities."""
        rng = np.random.default_rng(self.seed)
        return rng.binomial(self.count_B, true_B, size=(_DRAWS, len(true_B))) / self.count_B

    def _error(self, accuracy_B: Floats) -> float:
        return float(self.count_B @ np.abs(self.claimed_B - accuracy_B) / self.count_B.sum())


def brier_score(confidence: Sequence[float], correct: Sequence[float]) -> float | None:
    """Compute the mean squared error of probabilities: mean (p − y)².

    It is a proper scoring rule, which rewards both calibration and sharpness.
    Brier 1950 (https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2).

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] outcomes in [0, 1].

    Returns:
        The score in [0, 1]; 0 is perfect, and a constant 0.5 has 0.25. None without cases.

    Raises:
        ValueError: the lengths differ, or a number is outside [0, 1].
    """
    confidence_N, correct_N = _probabilities(confidence, correct)
    return float(np.square(confidence_N - correct_N).mean()) if confidence_N.size else None


def risk_coverage(confidence: Sequence[float], correct: Sequence[float], *, points: int = 20) -> list[tuple[float, float]]:
    """Compute the risk-coverage curve: the error rate among the most confident cases, over the share of cases answered.

    At coverage c the ⌈c N⌉ most confident cases are answered (ties by position), and the risk is their error rate. Geifman and
    El-Yaniv 2017 (https://arxiv.org/abs/1705.08500).

    Args:
        confidence: [N] any finite scores; only their order matters.
        correct: [N] outcomes in [0, 1].
        points: number of coverages, k / points for k = 1 ... points; > 0. Default: 20.

    Returns:
        (coverage, risk) with the actual coverage, strictly increasing to 1; fewer than `points` if N is smaller, empty without
        cases.

    Raises:
        ValueError: the lengths differ, a score is not finite, an outcome is outside [0, 1], or points is not positive.
    """
    if points <= 0:
        raise ValueError(f"points must be positive, got {points}")
    risk_N = _risks(confidence, correct)
    n = risk_N.size
    # ceil(k n / points). Small n repeats counts, which the set removes.
    answered = sorted({-(-k * n // points) for k in range(1, points + 1)} - {0})
    return [(count / n, float(risk_N[count - 1])) for count in answered]


def aurc(confidence: Sequence[float], correct: Sequence[float]) -> float | None:
    """Compute the area under the risk-coverage curve: (1 / N) Σ_k risk of the k most confident cases.

    Geifman et al. 2019, section 3 (https://arxiv.org/abs/1805.08206).

    Args:
        confidence: [N] any finite scores; only their order matters (ties by position).
        correct: [N] outcomes in [0, 1].

    Returns:
        The area in [0, 1], lower is better; a random order has the overall error rate. None without cases.

    Raises:
        ValueError: as in `risk_coverage`.
    """
    risk_N = _risks(confidence, correct)
    return float(risk_N.mean()) if risk_N.size else None


def fit_temperature(logits: Sequence[float], labels: Sequence[float], *, prior: float | None = None) -> float:
    """Fit the temperature T > 0 of σ(logit / T) to the labels by minimising the log loss.

    min_T Σ log(1 + e^{z/T}) − y z/T + (log T)² / (2 prior²)

    T > 1 means that the logits are overconfident. The order of cases does not change. Guo et al. 2017, section 4.2
    (https://arxiv.org/abs/1706.04599). The last term, a normal prior on log T around 0, is optional: without it the optimum for
    few or separable labels is T = 0, a confidence of 1 in all cases.

    Args:
        logits: [N], N > 0, log-odds that the label is 1, finite.
        labels: [N], in [0, 1]; soft labels are allowed.
        prior: Optional. Standard deviation of log T, > 0. Default: no prior.

    Returns:
        T, clipped to TEMPERATURE_RANGE; 1 if all logits are 0, for which every T fits equally well.

    Raises:
        ValueError: no cases, the lengths differ, a logit is not finite, a label is outside [0, 1], or the prior is not
            positive.
    """
    logits_N, labels_N = _scores_and_outcomes(logits, labels)
    if logits_N.size == 0:
        raise ValueError("fitting a temperature needs at least one case")
    if prior is not None and not prior > 0:
        raise ValueError(f"the prior's standard deviation must be positive, got {prior}")
    if not logits_N.any():
        return 1.0
    # 1 / variance of the normal prior on log T.
    precision = 0.0 if prior is None else 1 / prior**2

    def loss(log_t: float) -> float:
        scaled_N = logits_N * math.exp(-log_t)
        return float((np.logaddexp(0, scaled_N) - labels_N * scaled_N).sum()) + precision * log_t**2 / 2

    def rises(log_t: float) -> bool:
        scaled_N = logits_N * math.exp(-log_t)
        # >= 0, because for separable labels the optimum is T = 0, where the sigmoid saturates and the slope rounds to 0.
        return float(precision * log_t - scaled_N @ (sigmoid(scaled_N) - labels_N)) >= 0

    # The log loss has one minimum, but with the prior there may be two, so locate the lower one on a grid first.
    coldest, hottest = (math.log(bound) for bound in TEMPERATURE_RANGE)
    grid = np.linspace(coldest, hottest, _GRID).tolist()
    best = min(range(_GRID), key=lambda i: loss(grid[i]))
    low, high = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
    # Bisection on the sign of the slope, between the neighbours of the best grid point.
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
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


def _whole_groups(confidence_N: Floats, bins: int) -> list[NDArray[np.int64]]:
    """Return bins of about equal mass that never split equal confidences, whose order would otherwise determine the gaps."""
    order_N = np.argsort(confidence_N, kind="stable")
    sorted_N = confidence_N[order_N]
    # Each cut moves left to the first case with the same confidence; cuts that coincide merge their bins.
    cuts = {int(np.searchsorted(sorted_N, sorted_N[sorted_N.size * k // bins], side="left")) for k in range(1, bins)}
    return np.split(order_N, sorted(cuts - {0}))


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
        raise ValueError(f"scores and outcomes must have equal lengths, got {scores_N.size} and {outcomes_N.size}")
    if not np.isfinite(scores_N).all():
        raise ValueError("every score must be finite, got NaN or infinity")
    _check_unit_interval(outcomes_N, "an outcome")
    return scores_N, outcomes_N


def _check_unit_interval(values_N: Floats, name: str) -> None:
    outside = values_N[~((values_N >= 0) & (values_N <= 1))]
    if outside.size:
        raise ValueError(f"{name} must be in [0, 1], got {outside[:5].tolist()}")
