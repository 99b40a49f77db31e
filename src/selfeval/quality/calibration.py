"""Does a confidence of 0.8 mean right 8 times in 10, and what is gained by answering only when sure?

Shapes: N cases. `confidence` is what the model claimed, `correct` what happened (True/False, or a soft label in [0,
1]). A measure of no cases is None: unscored is not zero.
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
"""Bounds of a fitted temperature; separable labels would ask for 0, inverted ones for infinity."""

BINS = 15
"""Bins of a calibration error, at most."""
CASES_PER_BIN = 10
_DRAWS = 1000
_HALVINGS = 16
"""Bisections of the strength of a miscalibration in [0, 1]: 1e-5 of a probability."""
_GRID = 400


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
    confidence: Sequence[float], correct: Sequence[float], *, bins: int = BINS, scheme: Binning = "equal_mass"
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


def calibration_error(confidence: Sequence[float], correct: Sequence[bool], *, bins: int = BINS, seed: int = 0) -> Figure:
    """Estimate the expected calibration error without its bias, with a 95 % interval that covers a true 0.

    The plug-in error of `expected_calibration_error` sums |gap|, which noise alone makes positive; a bootstrap adds the noise
    a second time, so that its interval covers a true 0 in less than half of the draws. Kumar et al. 2019
    (https://arxiv.org/abs/1909.10155) show the bias, Roelofs et al. 2022 (https://arxiv.org/abs/2012.08668) measure it by
    simulating outcomes, as is done here:

    value   the error under which the median of simulated plug-in errors is the measured one, the true gaps being in
            proportion to the measured ones; 0 where a calibrated model shows as much in half of the draws
    low     measured error − 97.5 % quantile of the noise Σ_b n_b / N |accuracy_b − its expectation|. By the triangle
            inequality the noise cannot add more, whichever bins the true gaps are in
    high    the largest error under which the measured one is above the 2.5 % quantile (test inversion, Carpenter 1999,
            https://doi.org/10.1111/1467-9868.00173); the largest of three ways to spread it over the bins: like the measured
            gaps enlarged by their standard errors, overconfidence in all bins, and underconfidence in all bins

    Args:
        confidence: [N] probabilities in [0, 1].
        correct: [N] booleans.
        bins: of equal mass; fewer where a bin would hold fewer than 10 cases, and equal confidences share a bin.
        seed: seed of the simulation; the interval depends on it alone.

    Returns:
        The error in [0, 1]; None for no cases.

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
    return Figure(value, min(low, value), max(high, value), confidence_N.size)


@dataclass(frozen=True)
class _PlugIn:
    """A measured plug-in error, and those of outcomes that are drawn with a known error.

    Attributes:
        claimed_B: mean confidence of each bin.
        accuracy_B: measured accuracy of each bin.
        count_B: cases of each bin.
        seed: of the draws, the same for every error, so that errors are compared on the same noise.
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
        enlarged_B = np.where(gap_B < 0, -1.0, 1.0) * (np.abs(gap_B) + errors_B)
        return max(self._bound(0.025, way_B, np.less_equal) for way_B in (enlarged_B, even_B, -even_B))

    @property
    def measured(self) -> float:
        return self._error(self.accuracy_B)

    @property
    def _smoothed_B(self) -> Floats:
        """Accuracies with one more right and one more wrong case: no bin is without noise."""
        return np.asarray((self.accuracy_B * self.count_B + 1) / (self.count_B + 2), dtype=np.float64)

    def _bound(self, quantile: float, way_B: Floats, is_within: Callable[[float, float], object]) -> float:
        """Return the largest error, spread in this way, under which the simulated quantile is within the measured error."""
        low, high = 0.0, 1 / float(np.abs(way_B).max())

        def is_possible(strength: float) -> bool:
            true_B = np.clip(self.claimed_B - strength * way_B, 0.0, 1.0)
            errors_R = np.abs(self.claimed_B - self._drawn(true_B)) @ self.count_B / self.count_B.sum()
            return bool(is_within(float(np.quantile(errors_R, quantile)), self.measured))

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
        """Accuracies `[R, B]` of outcomes with these probabilities."""
        rng = np.random.default_rng(self.seed)
        return rng.binomial(self.count_B, true_B, size=(_DRAWS, len(true_B))) / self.count_B

    def _error(self, accuracy_B: Floats) -> float:
        return float(self.count_B @ np.abs(self.claimed_B - accuracy_B) / self.count_B.sum())


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


def fit_temperature(logits: Sequence[float], labels: Sequence[float], *, prior: float | None = None) -> float:
    """Find the temperature T > 0 that makes σ(logit / T) fit the labels best, by log loss.

    min_T Σ log(1 + e^{z/T}) − y z/T + (log T)² / (2 prior²)

    T > 1 = the logits were overconfident. The order of cases never changes. Guo et al. 2017, section 4.2
    (https://arxiv.org/abs/1706.04599). The last term, a normal prior on log T around 0, is optional: without it few or
    separable labels ask for T = 0, that is, for a confidence of 1 in everything.

    Args:
        logits: [N], N > 0, log-odds that the label is 1, finite.
        labels: [N], in [0, 1]; soft labels are allowed.
        prior: standard deviation of log T, > 0; None for none.

    Returns:
        T within TEMPERATURE_RANGE (an end when the optimum is outside); 1 when every logit is 0 and any T fits alike.

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
    precision = 0.0 if prior is None else 1 / prior**2

    def loss(log_t: float) -> float:
        scaled_N = logits_N * math.exp(-log_t)
        return float((np.logaddexp(0, scaled_N) - labels_N * scaled_N).sum()) + precision * log_t**2 / 2

    def rises(log_t: float) -> bool:
        scaled_N = logits_N * math.exp(-log_t)
        # >= 0: separable labels want T = 0, and there the sigmoid saturates and the slope rounds to 0.
        return float(precision * log_t - scaled_N @ (sigmoid(scaled_N) - labels_N)) >= 0

    # The loss alone has one minimum; with the prior it may have two, so that the lower one is found on a grid first.
    coldest, hottest = (math.log(bound) for bound in TEMPERATURE_RANGE)
    grid = np.linspace(coldest, hottest, _GRID).tolist()
    best = min(range(_GRID), key=lambda i: loss(grid[i]))
    low, high = grid[max(0, best - 1)], grid[min(_GRID - 1, best + 1)]
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
    """Bins of about equal mass that do not part equal confidences, whose order would decide the gaps."""
    order_N = np.argsort(confidence_N, kind="stable")
    sorted_N = confidence_N[order_N]
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
        raise ValueError(f"each case needs a score and an outcome, got {scores_N.size} and {outcomes_N.size}")
    if not np.isfinite(scores_N).all():
        raise ValueError("every score must be finite, got NaN or infinity")
    _check_unit_interval(outcomes_N, "an outcome")
    return scores_N, outcomes_N


def _check_unit_interval(values_N: Floats, name: str) -> None:
    outside = values_N[~((values_N >= 0) & (values_N <= 1))]
    if outside.size:
        raise ValueError(f"{name} must be in [0, 1], got {outside[:5].tolist()}")
