"""Figures with their n and their interval: a number alone is not a result.

Shapes: N cases, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Figure",
    "bootstrap_interval",
    "mcnemar_exact",
    "mean_figure",
    "paired_difference",
    "percentile_interval",
    "proportion",
    "ratio_of_means",
    "spearman",
    "spearman_figure",
    "wilson_interval",
]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

INDICES_PER_CHUNK = 2_000_000
"""Bootstrap indices held at once (16 MB); more cases cost time, not memory."""


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval and the number of cases behind it.

    `value`, `ci_low` and `ci_high` are None when they are undefined (no cases, a division by 0): unscored is not zero.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int

    def as_json(self) -> dict[str, float | int | None]:
        """Return {"value", "ci_low", "ci_high", "n"} with 6 decimals, as report.json has it.

        Example:
            >>> Figure(2 / 3, 0.2, 0.9, 3).as_json()
            {'value': 0.666667, 'ci_low': 0.2, 'ci_high': 0.9, 'n': 3}
        """
        return {
            "value": _rounded(self.value),
            "ci_low": _rounded(self.ci_low),
            "ci_high": _rounded(self.ci_high),
            "n": self.n,
        }


def wilson_interval(successes: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Bound a probability from a count of successes by Wilson's score interval.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   p = successes / n

    Unlike p ± z·se it stays in [0, 1] and is not empty at 0 or n successes. Wilson 1927
    (https://doi.org/10.1080/01621459.1927.10502953); no continuity correction.

    Args:
        successes: in [0, n].
        n: number of independent cases, >= 0.
        confidence: coverage, in (0, 1).

    Returns:
        (low, high) in [0, 1]; (0, 1) when n is 0: nothing is known.

    Raises:
        ValueError: successes is not in [0, n], or confidence is not in (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n, got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + _checked_confidence(confidence) / 2)
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - half_width) / scale, (centre + half_width) / scale
    # At the ends the exact bound is 0 or 1; the formula leaves 1e-17.
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def proportion(outcomes: Sequence[bool]) -> Figure:
    """Measure a share of yes among yes/no outcomes, with Wilson's 95 % interval.

    Args:
        outcomes: [N] independent outcomes.

    Returns:
        The share; None and no interval for no outcomes.

    Example:
        >>> proportion([True, True, False, True]).as_json()
        {'value': 0.75, 'ci_low': 0.300642, 'ci_high': 0.954413, 'n': 4}
    """
    n, successes = len(outcomes), sum(map(bool, outcomes))
    if n == 0:
        return Figure(None, None, None, 0)
    return Figure(successes / n, *wilson_interval(successes, n), n)


def mean_figure(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Figure:
    """Average values of any distribution, with a 95 % percentile bootstrap interval.

    Efron 1979 (https://doi.org/10.1214/aos/1176344552). With few or equal values the interval is too narrow (one value:
    no width at all); values that are all 0 or all 1 get Wilson's interval instead. For yes/no outcomes use `proportion`.

    Args:
        values: [N], finite.
        seed: of the resampling; one seed gives one interval.
        resamples: R, > 0.

    Returns:
        The mean; None and no interval for no values.

    Raises:
        ValueError: a value is not finite.
    """
    values_N = _finite(values, "values")
    if values_N.size == 0:
        return Figure(None, None, None, 0)
    mean = float(values_N.mean())
    if mean in (0.0, 1.0) and bool((values_N == mean).all()):
        return Figure(mean, *wilson_interval(round(mean * values_N.size), values_N.size), values_N.size)
    low, high = bootstrap_interval(lambda index_RN: values_N[index_RN].mean(-1), values_N.size, seed=seed, resamples=resamples)
    return Figure(mean, low, high, values_N.size)


def ratio_of_means(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, *, resamples: int = 2000
) -> Figure:
    """Divide the mean of one quantity by that of another on the same cases, with a paired 95 % bootstrap interval.

    Σ a / Σ b

    A resample takes whole cases, so what a and b share (a long question has long replies before and after) does not
    widen the interval. Efron and Tibshirani 1993, section 10.3 (https://doi.org/10.1201/9780429246593).

    Args:
        numerators: [N], finite.
        denominators: [N], finite, of the same cases in the same order.
        seed: of the resampling.
        resamples: R, > 0. Those whose denominator is 0 are left out of the interval.

    Returns:
        The ratio; None where it is undefined (no cases, or denominators that sum to 0).

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    a_N, b_N = _finite(numerators, "numerators"), _finite(denominators, "denominators")
    if a_N.size != b_N.size:
        raise ValueError(f"paired values need equal lengths, got {a_N.size} numerators and {b_N.size} denominators")
    if a_N.size == 0 or b_N.sum() == 0:
        return Figure(None, None, None, a_N.size)

    def ratios_R(index_RN: Indices) -> Floats:
        below_R = b_N[index_RN].sum(-1)
        return np.asarray(a_N[index_RN].sum(-1) / np.where(below_R == 0, np.nan, below_R), dtype=np.float64)

    low, high = bootstrap_interval(ratios_R, a_N.size, seed=seed, resamples=resamples)
    return Figure(float(a_N.sum() / b_N.sum()), low, high, a_N.size)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlate the ranks of two quantities: Pearson's r of their ranks, equal values sharing the mean of theirs.

    Spearman 1904 (https://doi.org/10.2307/1412159).

    Args:
        x: [N], finite.
        y: [N], finite, of the same cases in the same order.

    Returns:
        In [-1, 1]; None where it is undefined (fewer than two cases, or a quantity that does not vary).

    Raises:
        ValueError: the lengths differ, or a value is not finite.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
        0.5
    """
    x_N, y_N = _finite(x, "x"), _finite(y, "y")
    if x_N.size != y_N.size:
        raise ValueError(f"paired values need equal lengths, got {x_N.size} and {y_N.size}")
    found = _rank_correlation(x_N, y_N)
    return None if math.isnan(found) else found


def spearman_figure(x: Sequence[float], y: Sequence[float], seed: int = 0, *, resamples: int = 500) -> Figure:
    """Give `spearman` its 95 % bootstrap interval; ranks are taken anew in every resample.

    Args:
        x: [N], finite.
        y: [N], finite, of the same cases in the same order.
        seed: of the resampling.
        resamples: R, > 0. Those in which a quantity does not vary are left out of the interval.

    Returns:
        The correlation; None where it is undefined.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    value, x_N, y_N = spearman(x, y), _finite(x, "x"), _finite(y, "y")
    if value is None:
        return Figure(None, None, None, x_N.size)

    def correlations_R(index_RN: Indices) -> Floats:
        return np.array([_rank_correlation(x_N[index_N], y_N[index_N]) for index_N in index_RN])

    return Figure(value, *bootstrap_interval(correlations_R, x_N.size, seed=seed, resamples=resamples), x_N.size)


def _rank_correlation(x_N: Floats, y_N: Floats) -> float:
    """NaN where it is undefined."""
    if x_N.size < 2:
        return math.nan
    a_N, b_N = (ranks - ranks.mean() for ranks in (_ranks(x_N), _ranks(y_N)))
    scale = math.sqrt(float((a_N * a_N).sum() * (b_N * b_N).sum()))
    return float((a_N * b_N).sum()) / scale if scale > 0 else math.nan


def _ranks(values_N: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[place_N], dtype=np.float64)


def mcnemar_exact(b: int, c: int) -> float:
    """Test whether two systems that were tried on the same cases are equally often right (McNemar, exact, two-sided).

    p = min(1, 2 Σ_{i <= min(b, c)} C(b + c, i) / 2^(b + c))

    Cases on which both are right or both wrong say nothing and are not counted. McNemar 1947
    (https://doi.org/10.1007/BF02295996).

    Args:
        b: cases that only the first system has right, >= 0.
        c: cases that only the second has right, >= 0.

    Returns:
        p value in (0, 1]; 1 when b + c is 0.

    Raises:
        ValueError: a count is negative.

    Example:
        >>> mcnemar_exact(1, 9)
        0.021484375
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts must be >= 0, got {b} and {c}")
    n, term, tail = b + c, 1, 1
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)
        tail += term
    # Integers of any size, divided once: no rounding, no overflow.
    return min(1.0, 2 * tail / (1 << n))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Figure:
    """Measure by how much a share changed that was taken twice on the same cases, with its 95 % score interval.

    d = p_after − p_before. With Wilson's interval (l, u) of each share and the correlation φ of the pairs,

    low = d − √((p_a − l_a)² − 2 φ (p_a − l_a)(u_b − p_b) + (u_b − p_b)²)
    high = d + √((p_b − l_b)² − 2 φ (p_b − l_b)(u_a − p_a) + (u_a − p_a)²)

    A positive φ = (e h − f g) / √((e + f)(g + h)(e + g)(f + h)), from the counts e (both), f (after only), g (before only) and
    h (neither), has e h − f g lowered by n / 2, down to 0. Newcombe 1998, method 10
    (https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C). It has a width also where no case
    changed, which the bootstrap has not.

    Args:
        before: [N], what was found of each case the first time.
        after: [N], the same cases in the same order.

    Returns:
        The difference; None and no interval for no cases.

    Raises:
        ValueError: the numbers of cases differ.

    Example:
        >>> paired_difference([True] * 36 + [False] * 12 + [True] * 2, [True] * 48 + [False] * 2).as_json()
        {'value': 0.2, 'ci_low': 0.056894, 'ci_high': 0.340429, 'n': 50}
    """
    if len(before) != len(after):
        raise ValueError(f"a case has a before and an after, got {len(before)} and {len(after)}")
    n = len(before)
    if n == 0:
        return Figure(None, None, None, 0)
    pairs = [(bool(b), bool(a)) for b, a in zip(before, after, strict=True)]
    both, gained, lost = (pairs.count(pair) for pair in ((True, True), (False, True), (True, False)))
    p_a, p_b = (both + gained) / n, (both + lost) / n
    (low_a, high_a), (low_b, high_b) = wilson_interval(both + gained, n), wilson_interval(both + lost, n)
    phi = _pair_correlation(both, gained, lost, n - both - gained - lost)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    d = (gained - lost) / n
    return Figure(d, d - reach(p_a - low_a, high_b - p_b), d + reach(p_b - low_b, high_a - p_a), n)


def _pair_correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Newcombe's φ; 0 where one of the shares is 0 or 1."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(0.0, product - (both + gained + lost + neither) / 2)
    return product / math.sqrt(margins) if margins else 0.0


def bootstrap_interval(
    statistic: Callable[[Indices], Floats], n: int, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """Bound a statistic of n cases by the percentiles of its values on resampled cases.

    Efron 1979 (https://doi.org/10.1214/aos/1176344552).

    Args:
        statistic: maps case indices [R, N] to R values; NaN = undefined on that resample, left out.
        n: number of cases, > 0.
        seed: of the resampling; one seed gives one interval, whatever the memory.
        resamples: R, > 0.
        confidence: coverage, in (0, 1).

    Returns:
        (low, high); (None, None) when the statistic is undefined on every resample.

    Raises:
        ValueError: n or resamples is not positive, or confidence is not in (0, 1).
    """
    if n <= 0 or resamples <= 0:
        raise ValueError(f"a bootstrap needs cases and resamples, got {n} cases and {resamples} resamples")
    rng = np.random.default_rng(seed)
    rows = max(1, INDICES_PER_CHUNK // n)
    chunks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    values_R = np.concatenate([statistic(rng.integers(0, n, size=(size, n))) for size in chunks])
    return percentile_interval(values_R[~np.isnan(values_R)], confidence=confidence)


def percentile_interval(values: Floats, *, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Cut off the tails of a sample: the (1 ± confidence) / 2 percentiles, linear between order statistics.

    Hyndman and Fan 1996, definition 7 (https://doi.org/10.1080/00031305.1996.10473566).

    Args:
        values: [R], finite.
        confidence: share that stays inside, in (0, 1).

    Returns:
        (low, high); (None, None) for no values.

    Raises:
        ValueError: confidence is not in (0, 1).
    """
    tail = (1 - _checked_confidence(confidence)) / 2
    if values.size == 0:
        return None, None
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence


def _finite(values: Sequence[float], name: str) -> Floats:
    values_N = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values_N).all():
        raise ValueError(f"{name} must be finite, got {[v for v in values_N.tolist() if not math.isfinite(v)][:5]}")
    return values_N
