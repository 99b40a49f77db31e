"""Intervals of statistics of a whole collection, by leaving out cases in turn.

The bootstrap does not suit measures of diversity: it draws cases twice, and equal texts lower the measured diversity.

Shapes: N cases, G groups, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, student_quantile

__all__ = ["FEWEST_CASES", "MOST_SINGLE", "Bounds", "Kept", "jackknife"]

Kept = NDArray[np.bool_]
"""`[N]`, True for the cases that are used."""

Bounds = tuple[float, float]
"""Smallest and largest possible value of a statistic."""

FEWEST_CASES = 10
"""With fewer cases there is no interval."""
MOST_SINGLE = 200
"""Up to so many cases, each case is left out alone; with more, groups of cases are."""


def jackknife(
    statistics: Callable[[Kept], Sequence[float]], n: int, *, bounds: Sequence[Bounds] | None = None, groups: int = 20
) -> list[Figure]:
    """Compute statistics of n cases with 95 % intervals, by the jackknife.

    θ ± t_{G−1} √((n − m)² / (n m (G − 1)) Σ_g (θ_g − mean θ)²), where θ_g is computed without the m cases of group g.

    Up to `MOST_SINGLE` cases there are G = n groups of m = 1. With more cases there are `groups` groups of m = ⌊n / G⌋, and the
    n mod G cases at the end are in no group. All groups have the same size, because diversity depends on the number of cases:
    groups of two sizes would give an interval even to a statistic that is a function of that number.

    Derivation of the factor: of a mean, θ_g − mean θ = −m / (n − m) (x̄_g − mean x̄_g), and the means x̄_g of m cases have the
    variance σ² / m. So E Σ_g (θ_g − mean θ)² = m (G − 1) σ² / (n − m)², and the factor makes it σ² / n. With G m = n the factor
    is (G − 1) / G, as usual. The variance is overestimated on average: Efron and Stein 1981
    (https://doi.org/10.1214/aos/1176345462). Groups: Kott 2001, "The delete-a-group jackknife".

    Args:
        statistics: maps the cases that are used to S statistics. Statistics of the same cases share the groups, so their
            difference, as one more statistic, has a paired interval.
        n: number of cases.
        bounds: Optional. S ranges, to which the intervals are clipped. Default: none.
        groups: number of groups G with more than `MOST_SINGLE` cases, 2 to `MOST_SINGLE`. Default: 20.

    Returns:
        S figures. A statistic that is NaN on all cases has no value. There is no interval with fewer than `FEWEST_CASES` cases,
        or if a statistic is NaN without some group.

    Raises:
        ValueError: the number of groups is not 2 to `MOST_SINGLE`.

    Example:
        >>> values = np.arange(20.0)
        >>> [figure] = jackknife(lambda kept: [values[kept].mean()], 20)
        >>> round(figure.ci_high - figure.value, 4) == round(2.093024 * values.std(ddof=1) / 20**0.5, 4)
        True
    """
    if not 2 <= groups <= MOST_SINGLE:
        raise ValueError(f"a jackknife needs 2 to {MOST_SINGLE} groups, got {groups}")
    whole = list(statistics(np.ones(n, dtype=np.bool_)))
    limits = bounds or [(-math.inf, math.inf)] * len(whole)
    count = n if n <= MOST_SINGLE else groups
    errors = [math.nan] * len(whole) if n < FEWEST_CASES else _errors(statistics, n, count)
    return [_figure(*row, n, count) for row in zip(whole, errors, limits, strict=True)]


def _errors(statistics: Callable[[Kept], Sequence[float]], n: int, groups: int) -> list[float]:
    size = n // groups
    group_N = np.arange(n) % groups
    group_N[groups * size :] = groups  # in no group
    left_GS = np.array([list(statistics(group_N != group)) for group in range(groups)], dtype=np.float64)
    squares_S = ((left_GS - left_GS.mean(axis=0)) ** 2).sum(axis=0)
    found: list[float] = np.sqrt((n - size) ** 2 / (n * size * (groups - 1)) * squares_S).tolist()
    return found


def _figure(value: float, error: float, bounds: Bounds, n: int, groups: int) -> Figure:
    value = float(value)  # numpy's numbers are compared and shown differently
    if math.isnan(value):
        return Figure(None, None, None, n)
    if math.isnan(error):
        return Figure(value, None, None, n)
    reach = student_quantile(0.975, groups - 1) * error
    return Figure(value, max(bounds[0], value - reach), min(bounds[1], value + reach), n)
