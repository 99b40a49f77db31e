"""Statistics with their number of cases and their interval.

Shapes: N cases, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import overload

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEWEST_RANKS",
    "Figure",
    "booleans",
    "bootstrap_interval",
    "clustered_mean",
    "clustered_ratio",
    "finite",
    "mcnemar_exact",
    "mean_figure",
    "paired_difference",
    "percentile_interval",
    "proportion",
    "ratio_of_means",
    "rounded",
    "sigmoid",
    "spearman",
    "spearman_figure",
    "student_quantile",
    "wilson_interval",
]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

FEWEST_RANKS = 10
INDICES_PER_CHUNK = 2_000_000
"""Maximum number of bootstrap indices in memory (16 MB); more cases take more time, not more memory."""


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval and number of cases.

    `value`, `ci_low` and `ci_high` are None, not 0, if they are undefined (no cases, a division by 0).
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int

    @property
    def known(self) -> float:
        """The value, which must be defined.

        Raises:
            ValueError: the value is undefined.
        """
        if self.value is None:
            raise ValueError("the figure has no value, because it has no cases")
        return self.value

    def as_json(self) -> dict[str, float | int | None]:
        """Return {"value", "ci_low", "ci_high", "n"} with 6 decimals, as report.json has it.

        Example:
            >>> Figure(2 / 3, 0.2, 0.9, 3).as_json()
            {'value': 0.666667, 'ci_low': 0.2, 'ci_high': 0.9, 'n': 3}
        """
        return {
            "value": rounded(self.value),
            "ci_low": rounded(self.ci_low),
            "ci_high": rounded(self.ci_high),
            "n": self.n,
        }


def wilson_interval(successes: float, n: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a probability.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   p = successes / n

    Unlike p ± z·se it stays within [0, 1] and has a positive width at 0 and n successes. Wilson 1927
    (https://doi.org/10.1080/01621459.1927.10502953); no continuity correction.

    Args:
        successes: number of successes, in [0, n].
        n: number of independent cases, >= 0; for weighted or clustered cases their effective number, which need not be whole.
        confidence: coverage, in (0, 1). Default: 0.95.

    Returns:
        (low, high) in [0, 1]; (0, 1) if n is 0.

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
    # At 0 and n successes the exact bound is 0 or 1, but the formula is off by about 1e-17.
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def proportion(outcomes: Sequence[bool]) -> Figure:
    """Compute the share of True among boolean outcomes, with Wilson's 95 % interval.

    Args:
        outcomes: [N] independent outcomes, booleans. Leave out cases without an outcome; None is not False.

    Returns:
        The share; None without outcomes.

    Raises:
        ValueError: an outcome is not a boolean.

    Example:
        >>> proportion([True, True, False, True]).as_json()
        {'value': 0.75, 'ci_low': 0.300642, 'ci_high': 0.954413, 'n': 4}
    """
    n, successes = len(outcomes), sum(booleans(outcomes, "outcomes"))
    if n == 0:
        return Figure(None, None, None, 0)
    return Figure(successes / n, *wilson_interval(successes, n), n)


def mean_figure(values: Sequence[float], *, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Figure:
    """Compute the mean of independent values, with a 95 % interval.

    with bounds      m' ± t_{N+1} s' / √(N + 2), clipped to the bounds; m' and s' are the mean and the standard deviation of
                     the values and two pseudo-values, one at each bound
    without bounds   m ± t_{N−1} s / √N

    The pseudo-values are the adjusted Wald interval of Bonett and Price 2012 (https://doi.org/10.3102/1076998611411915), here
    with Student's quantile. The interval has a positive width even if all values are equal (six ties do not prove a tie), and
    its coverage is close to 95 % from four values on. The mean itself is not adjusted. Without bounds there is no interval for
    equal values, because their scale is unknown.

    Args:
        values: [N], finite and within the bounds.
        bounds: Optional. Bounds of the scale of the values; None for an unbounded quantity, such as nats. Default: (0, 1), for
            scores and credits.

    Returns:
        The mean; None without values. Without bounds, there is no interval for fewer than two values or for equal ones.

    Raises:
        ValueError: a value is not finite, or is outside the bounds.

    Example:
        >>> mean_figure([0.5] * 6).as_json()
        {'value': 0.5, 'ci_low': 0.276564, 'ci_high': 0.723436, 'n': 6}
    """
    values_N = finite(values, "values")
    if values_N.size == 0:
        return Figure(None, None, None, 0)
    mean = float(values_N.mean())
    if bounds is None:
        return Figure(mean, *_student_interval(values_N), values_N.size)
    low, high = bounds
    if values_N.min() < low or values_N.max() > high:
        raise ValueError(f"values must be in [{low}, {high}], got {values_N.min()} to {values_N.max()}")
    # Never None: the two bounds differ, so these values are not all equal.
    under, over = _student_interval(np.append(values_N, bounds))
    assert under is not None
    assert over is not None
    # The interval is centred on m', not on the mean; if the mean is at a bound, rounding may put it 1e-17 outside.
    return Figure(mean, max(low, min(under, mean)), min(high, max(over, mean)), values_N.size)


def _student_interval(values_N: Floats) -> tuple[float | None, float | None]:
    """Return Student's interval, or (None, None) for fewer than two values or equal ones."""
    # Compare for equality, because the computed deviation of equal numbers can be 1e-17 instead of 0.
    if values_N.size < 2 or values_N.min() == values_N.max():
        return None, None
    centre, error = float(values_N.mean()), float(values_N.std(ddof=1)) / math.sqrt(values_N.size)
    reach = student_quantile(0.975, values_N.size - 1) * error
    return centre - reach, centre + reach


def clustered_mean(values: Sequence[float], clusters: Sequence[object]) -> Figure:
    """Compute the mean of values that are dependent within clusters, such as the replies to one question.

    Σ_c Σ_i x_ci / Σ_c n_c, with the interval of `ratio_of_means` over clusters: the cluster-robust variance (Liang and Zeger
    1986, https://doi.org/10.1093/biomet/73.1.13).

    Args:
        values: [N], finite.
        clusters: [N], the cluster of each value; any hashable.

    Returns:
        The mean over all values; `n` is the number of clusters, the independent cases.

    Raises:
        ValueError: the lengths differ, or a value is not finite.

    Example:
        >>> clustered_mean([1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "c"]).as_json()["n"]
        3
    """
    return clustered_ratio(values, [1.0] * len(values), clusters)


def clustered_ratio(numerators: Sequence[float], denominators: Sequence[float], clusters: Sequence[object]) -> Figure:
    """Compute the ratio of the means of two quantities that are dependent within clusters: `ratio_of_means` of cluster sums.

    Args:
        numerators: [N], finite.
        denominators: [N], finite, of the same cases in the same order.
        clusters: [N], the cluster of each case; any hashable.

    Returns:
        The ratio; `n` is the number of clusters, the independent cases.

    Raises:
        ValueError: the lengths differ, or a value is not finite.

    Example:
        >>> clustered_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], ["a", "a", "b"]).as_json()["n"]
        2
    """
    if not len(numerators) == len(denominators) == len(clusters):
        raise ValueError(
            f"values and clusters must have equal lengths, got {len(numerators)} and {len(denominators)} values and "
            f"{len(clusters)} clusters"
        )
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    place_N = np.array([place[cluster] for cluster in clusters], dtype=np.int64)
    a_N, b_N = finite(numerators, "numerators"), finite(denominators, "denominators")
    return ratio_of_means(*(np.bincount(place_N, weights=values_N).tolist() for values_N in (a_N, b_N)))


def ratio_of_means(numerators: Sequence[float], denominators: Sequence[float]) -> Figure:
    """Compute the ratio of the means of two quantities on the same cases, with a 95 % interval.

    r = Σ a / Σ b,   r ± t_{N−1} s / (√N mean(b)),   s² = Σ (a − r b)² / (N − 1)

    The residuals are computed per case, so variation that a and b share (a long question has long replies before and after)
    does not widen the interval. Cochran 1977, "Sampling Techniques", section 6.3, with Student's quantile.

    Args:
        numerators: [N], finite.
        denominators: [N], finite, of the same cases in the same order.

    Returns:
        The ratio; None if it is undefined (no cases, or denominators that sum to 0). There is no interval for fewer than two
        cases, or if all cases have the same ratio.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    a_N, b_N = finite(numerators, "numerators"), finite(denominators, "denominators")
    if a_N.size != b_N.size:
        raise ValueError(f"paired values need equal lengths, got {a_N.size} numerators and {b_N.size} denominators")
    if a_N.size == 0 or b_N.sum() == 0:
        return Figure(None, None, None, a_N.size)
    ratio, mean = float(a_N.sum() / b_N.sum()), float(b_N.mean())
    residuals_N = a_N - ratio * b_N
    # If all cases have the same ratio, the residuals are rounding errors.
    if a_N.size < 2 or float(np.abs(residuals_N).max()) <= 1e-12 * float(np.abs(a_N).max()):
        return Figure(ratio, None, None, a_N.size)
    error = math.sqrt(float(residuals_N @ residuals_N) / (a_N.size - 1) / a_N.size)
    reach = student_quantile(0.975, a_N.size - 1) * error / abs(mean)
    return Figure(ratio, ratio - reach, ratio + reach, a_N.size)


def student_quantile(p: float, degrees: int) -> float:
    """Return a quantile of Student's t distribution, by bisection of its distribution function.

    The distribution function is the finite series of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4. Above 200 degrees of
    freedom the quantile is computed by the expansion 26.7.5, whose error is below 1e-9 there.

    Args:
        p: probability, in (0, 1).
        degrees: degrees of freedom, >= 1.

    Raises:
        ValueError: p is not in (0, 1), or degrees is not positive.

    Example:
        >>> round(student_quantile(0.975, 4), 4)
        2.7764
    """
    if not 0 < p < 1 or degrees < 1:
        raise ValueError(f"a quantile needs p in (0, 1) and at least one degree of freedom, got p = {p} and {degrees}")
    if p < 0.5:
        return -student_quantile(1 - p, degrees)
    if degrees > 200:
        z = NormalDist().inv_cdf(p)
        terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return float(z + sum(term / degrees**k for k, term in enumerate(terms, start=1)))
    # Bisection on the angle, t = sqrt(degrees) tan(angle), which is bounded while t is not.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_tail(middle, degrees) < 2 * p - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _student_tail(angle: float, degrees: int) -> float:
    """Return the probability that |t| is below √degrees · tan(angle)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    # A & S 26.7.3 for odd and 26.7.4 for even degrees; each term is the previous one times cos² (k - 1) / k.
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation: Pearson's r of the ranks, with mean ranks for ties.

    Spearman 1904 (https://doi.org/10.2307/1412159).

    Args:
        x: [N], finite.
        y: [N], finite, of the same cases in the same order.

    Returns:
        The correlation in [-1, 1]; None if it is undefined (fewer than two cases, or a quantity that does not vary).

    Raises:
        ValueError: the lengths differ, or a value is not finite.

    Example:
        >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
        0.5
    """
    x_N, y_N = finite(x, "x"), finite(y, "y")
    if x_N.size != y_N.size:
        raise ValueError(f"paired values need equal lengths, got {x_N.size} and {y_N.size}")
    found = _rank_correlation(x_N, y_N)
    return None if math.isnan(found) else found


def spearman_figure(x: Sequence[float], y: Sequence[float]) -> Figure:
    """Compute Spearman's rank correlation with a 95 % interval, by Fisher's transformation.

    tanh(atanh r ± z √((1 + r² / 2) / (N − 3))). Bonett and Wright 2000 (https://doi.org/10.1007/BF02294183). There is no
    interval for fewer than 10 cases, because so few ranks are often perfectly correlated by chance.

    Args:
        x: [N], finite.
        y: [N], finite, of the same cases in the same order.

    Returns:
        The correlation; None if it is undefined.

    Raises:
        ValueError: the lengths differ, or a value is not finite.
    """
    value, n = spearman(x, y), len(x)
    if value is None:
        return Figure(None, None, None, n)
    if n < FEWEST_RANKS:
        return Figure(value, None, None, n)
    # atanh(1) is infinite, so a perfect correlation gets the interval of one slightly below 1.
    centre = math.atanh(max(-1.0, min(1.0, value)) * (1 - 1 / n**2))
    reach = NormalDist().inv_cdf(0.975) * math.sqrt((1 + value * value / 2) / (n - 3))
    # The centre is shrunk above, so the value itself may be outside by a little.
    return Figure(value, min(value, math.tanh(centre - reach)), max(value, math.tanh(centre + reach)), n)


def _rank_correlation(x_N: Floats, y_N: Floats) -> float:
    """Return the rank correlation, NaN if it is undefined."""
    if x_N.size < 2:
        return math.nan
    # Pearson's formula on ranks; ties have mean ranks, for which the shortcut 1 - 6 Σd² / (n³ - n) is wrong.
    a_N, b_N = (ranks - ranks.mean() for ranks in (_ranks(x_N), _ranks(y_N)))
    scale = math.sqrt(float((a_N * a_N).sum() * (b_N * b_N).sum()))
    return float((a_N * b_N).sum()) / scale if scale > 0 else math.nan


def _ranks(values_N: Floats) -> Floats:
    """Return ranks from 1, with mean ranks for ties."""
    _, place_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[place_N], dtype=np.float64)


def mcnemar_exact(b: int, c: int) -> float:
    """Test whether two systems are equally often right on the same cases (McNemar's test, exact, two-sided).

    p = min(1, 2 Σ_{i <= min(b, c)} C(b + c, i) / 2^(b + c))

    Cases on which both are right or both are wrong carry no information and are not counted. McNemar 1947
    (https://doi.org/10.1007/BF02295996).

    Args:
        b: number of cases that only the first system has right, >= 0.
        c: number of cases that only the second system has right, >= 0.

    Returns:
        The p-value in (0, 1]; 1 if b + c is 0.

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
    # Sum in integers and divide once, so nothing overflows and only the quotient is rounded.
    return min(1.0, 2 * tail / (1 << n))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Figure:
    """Compute the change of a share measured twice on the same cases, with a 95 % score interval.

    d = p_after − p_before. With Wilson's interval (l, u) of each share and the correlation φ of the pairs,

    low = d − √((p_a − l_a)² − 2 φ (p_a − l_a)(u_b − p_b) + (u_b − p_b)²)
    high = d + √((p_b − l_b)² − 2 φ (p_b − l_b)(u_a − p_a) + (u_a − p_a)²)

    A positive φ = (e h − f g) / √((e + f)(g + h)(e + g)(f + h)), from the counts e (both), f (after only), g (before only) and
    h (neither), has e h − f g reduced by n / 2, to no less than 0. Newcombe 1998, method 10
    (https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C). Unlike that of the bootstrap, the
    interval has a positive width if no case changed.

    Args:
        before: [N], outcome of each case in the first measurement.
        after: [N], outcomes of the same cases in the same order in the second.

    Returns:
        The difference; None without cases.

    Raises:
        ValueError: the numbers of cases differ, or a finding is not a boolean.

    Example:
        >>> paired_difference([True] * 36 + [False] * 12 + [True] * 2, [True] * 48 + [False] * 2).as_json()
        {'value': 0.2, 'ci_low': 0.056894, 'ci_high': 0.340429, 'n': 50}
    """
    if len(before) != len(after):
        raise ValueError(f"before and after must have equal lengths, got {len(before)} and {len(after)}")
    n = len(before)
    if n == 0:
        return Figure(None, None, None, 0)
    pairs = list(zip(booleans(before, "before"), booleans(after, "after"), strict=True))
    both, gained, lost = (pairs.count(pair) for pair in ((True, True), (False, True), (True, False)))
    p_a, p_b = (both + gained) / n, (both + lost) / n
    (low_a, high_a), (low_b, high_b) = wilson_interval(both + gained, n), wilson_interval(both + lost, n)
    phi = _pair_correlation(both, gained, lost, n - both - gained - lost)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    d = (gained - lost) / n
    return Figure(d, d - reach(p_a - low_a, high_b - p_b), d + reach(p_b - low_b, high_a - p_a), n)


def _pair_correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Return Newcombe's φ; 0 if one of the shares is 0 or 1."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = float(both * neither - gained * lost)
    # Newcombe's continuity correction, for positive correlations only.
    if product > 0:
        product = max(0.0, product - (both + gained + lost + neither) / 2)
    return product / math.sqrt(margins) if margins else 0.0


def bootstrap_interval(
    statistic: Callable[[Indices], Floats], n: int, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float | None, float | None]:
    """Compute the percentile bootstrap interval of a statistic of n cases.

    Efron 1979 (https://doi.org/10.1214/aos/1176344552).

    Args:
        statistic: maps case indices [R, N] to R values; NaN marks a resample on which it is undefined, which is left out.
        n: number of cases, > 0.
        seed: seed of the resampling. The interval does not depend on the size of the chunks.
        resamples: number of resamples R, > 0.
        confidence: coverage, in (0, 1). Default: 0.95.

    Returns:
        (low, high); (None, None) if the statistic is undefined on all resamples.

    Raises:
        ValueError: n or resamples is not positive, or confidence is not in (0, 1).
    """
    if n <= 0 or resamples <= 0:
        raise ValueError(f"a bootstrap needs cases and resamples, got {n} cases and {resamples} resamples")
    rng = np.random.default_rng(seed)
    # The generator draws the same numbers in one piece or in many, so chunks do not change the interval.
    rows = max(1, INDICES_PER_CHUNK // n)
    chunks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    values_R = np.concatenate([statistic(rng.integers(0, n, size=(size, n))) for size in chunks])
    return percentile_interval(values_R[~np.isnan(values_R)], confidence=confidence)


def percentile_interval(values: Floats, *, confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Return the (1 ± confidence) / 2 percentiles of a sample, with linear interpolation between order statistics.

    Hyndman and Fan 1996, definition 7 (https://doi.org/10.1080/00031305.1996.10473566).

    Args:
        values: [R], finite.
        confidence: share of the sample inside the interval, in (0, 1). Default: 0.95.

    Returns:
        (low, high); (None, None) without values.

    Raises:
        ValueError: confidence is not in (0, 1).
    """
    tail = (1 - _checked_confidence(confidence)) / 2
    if values.size == 0:
        return None, None
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@overload
def sigmoid(x: float) -> float: ...


@overload
def sigmoid(x: Floats) -> Floats: ...


def sigmoid(x: Floats | float) -> Floats | float:
    """Compute 1 / (1 + exp(−x)) without overflow, for a number or an array.

    Example:
        >>> sigmoid(0.0), sigmoid(1e6)
        (0.5, 1.0)
    """
    # The forms for numbers and arrays differ in the last bit. Such a change of a temperature or a confidence can move a case
    # across the edge of a bin, so each caller keeps the form with which its recorded figures were computed.
    if isinstance(x, np.ndarray):
        return np.asarray(0.5 * (1 + np.tanh(x / 2)), dtype=np.float64)
    return 1 / (1 + math.exp(-max(-500.0, min(x, 500.0))))


def rounded(value: float | None) -> float | None:
    """Round to 6 decimals, the precision of numbers in files."""
    return None if value is None else round(value, 6)


def _checked_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return confidence


def booleans(values: Sequence[bool], name: str) -> list[bool]:
    """Return the values as Python booleans.

    Plain `bool` would convert a missing outcome (None) to False, and half a credit (0.5) to True.

    Args:
        values: Python or NumPy booleans.
        name: name of the values in the error message.

    Raises:
        ValueError: a value is not a boolean.
    """
    for place, value in enumerate(values):
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} must be True or False, got {value!r} at position {place}; leave out unknown cases")
    return [bool(value) for value in values]


def finite(values: Sequence[float], name: str) -> Floats:
    """Return the values as an array.

    Args:
        values: [N].
        name: name of the values in the error message.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    values_N = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values_N).all():
        raise ValueError(f"{name} must be finite, got {[v for v in values_N.tolist() if not math.isfinite(v)][:5]}")
    return values_N
