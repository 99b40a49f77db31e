"""Formatting of figures and numbers for people.

A quantity that was not measured is None, and a figure without cases has no value. Both are formatted as "not measured", never
as 0.
"""

from __future__ import annotations

import math

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure

__all__ = [
    "NOT_MEASURED",
    "cells",
    "compared",
    "count",
    "defined",
    "describe",
    "describe_difference",
    "difference_cells",
    "duration",
    "finite",
    "number",
    "percent",
    "points",
    "seconds",
    "tested",
]

NOT_MEASURED = "not measured"
TESTS = {"mcnemar_exact": "exact McNemar test", "sign_exact": "exact sign test", "binomial_exact": "exact binomial test"}


def defined(figure: Figure | None) -> Figure | None:
    """Return the figure if it has a value, otherwise None."""
    return None if figure is None or figure.value is None else figure


def compared(comparison: Comparison | None) -> Comparison | None:
    """Return the comparison if it has at least one question, otherwise None."""
    return None if comparison is None or comparison.difference.value is None else comparison


def finite(value: object) -> float | None:
    """Return `value` as a float if it is a finite number, otherwise None; booleans do not count as numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        known = float(value)
    except OverflowError:  # JSON allows integers that are too large for a float
        return None
    return known if math.isfinite(known) else None


def points(share: float) -> str:
    """Format a difference of two shares in percentage points.

    >>> points(0.0079), points(-0.132)
    ('0.8 points', '-13.2 points')
    """
    return f"{_in_points(share)} points"


def _in_points(share: float) -> str:
    return f"{round(share * 100, 1) + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0


def tested(comparison: Comparison) -> str:
    """Format the test and its p-value.

    >>> tested(Comparison(Figure(0.1, 0.0, 0.2, 9), 3, 0, 0.25, "sign_exact", "unclear"))
    'exact sign test p = 0.25'
    """
    p = comparison.p_value
    significance = "not measured" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return f"{TESTS[comparison.test]} {significance}"


def describe_difference(comparison: Comparison | None, *, turned: bool = False) -> str:
    """Format a paired difference with its interval, test and n, or "not measured".

    Args:
        comparison: the difference, if it was measured.
        turned: reverse the sign: theirs minus ours. Default: False.

    >>> describe_difference(Comparison(Figure(-0.0079, -0.0142, -0.0024, 1900), 12, 27, 0.007, "mcnemar_exact", "worse"))
    '-0.8 points (interval -1.4 to -0.2, exact McNemar test p = 0.007, n = 1,900)'
    """
    if comparison is None or comparison.difference.value is None:
        return NOT_MEASURED
    value, interval, n = difference_cells(comparison, turned=turned)
    return f"{value} ({'no interval' if interval == 'unknown' else f'interval {interval}'}, {tested(comparison)}, n = {n})"


def difference_cells(comparison: Comparison | None, *, turned: bool = False) -> tuple[str, str, str]:
    """Format a paired difference as three table cells: value, interval in points, n."""
    if comparison is None or comparison.difference.value is None:
        return NOT_MEASURED, "", ""
    figure, sign = comparison.difference, -1 if turned else 1
    if figure.ci_low is None or figure.ci_high is None:
        return points(sign * figure.known), "unknown", count(figure.n)
    # Reversing the sign swaps the ends.
    low, high = sorted((sign * figure.ci_low, sign * figure.ci_high))
    return points(sign * figure.known), f"{_in_points(low)} to {_in_points(high)}", count(figure.n)


def percent(value: float) -> str:
    """Format a share as a percentage.

    >>> percent(0.9312), percent(1e20)
    ('93.1%', '1e+22%')
    """
    return f"{value * 100:.1f}%" if abs(value) < 1e9 else f"{value * 100:.2g}%"


def number(value: float) -> str:
    """Format a number with three significant digits, in scientific notation only if it is very small or large.

    >>> number(0.012345), number(1.5), number(-12.34), number(12345.6), number(0.0000031)
    ('0.0123', '1.50', '-12.3', '12,346', '3.1e-06')
    """
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 8:
        return f"{value:.2g}"
    return f"{value:,.{max(0, 2 - magnitude)}f}"


def count(value: object) -> str:
    """Format an integer with thousands separators, or "not measured".

    >>> count(16000), count(None)
    ('16,000', 'not measured')
    """
    known = finite(value)
    return NOT_MEASURED if known is None else f"{round(known):,}"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours.

    >>> duration(12.34), duration(231.0), duration(7505.0)
    ('12.3 s', '3 min 51 s', '2 h 05 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def seconds(value: float) -> str:
    """Format the time per verdict.

    >>> seconds(0.00042), seconds(0.0081), seconds(2.5)
    ('0.420 ms', '8.10 ms', '2.50 s')
    """
    return f"{number(value)} s" if value >= 1 else f"{number(value * 1000)} ms"


def cells(figure: Figure | None, *, as_percent: bool = True) -> tuple[str, str, str]:
    """Format a figure as three table cells: value, interval, n.

    >>> cells(Figure(1.04, 1.03, 1.05, 1800), as_percent=False)
    ('1.04', '1.03 to 1.05', '1,800')
    """
    if figure is None or figure.value is None:
        return NOT_MEASURED, "", ""
    write = percent if as_percent else number
    if figure.ci_low is None or figure.ci_high is None:
        return write(figure.value), "unknown", count(figure.n)
    return write(figure.value), f"{write(figure.ci_low)} to {write(figure.ci_high)}", count(figure.n)


def describe(figure: Figure | None, *, as_percent: bool = True, of: str = "") -> str:
    """Format a figure with its interval and n, or "not measured"; `of` is appended to the value.

    >>> describe(Figure(0.931, 0.912, 0.946, 800), of=" of pairs")
    '93.1% of pairs (interval 91.2% to 94.6%, n = 800)'
    """
    if figure is None or figure.value is None:
        return NOT_MEASURED
    value, interval, n = cells(figure, as_percent=as_percent)
    known = "no interval" if interval == "unknown" else f"interval {interval}"
    return f"{value}{of} ({known}, n = {n})"
