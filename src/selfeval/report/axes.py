"""Scales, ticks and tick labels: the arithmetic under every chart."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Scale", "bounded", "nice_range", "nice_ticks", "tick_text", "widened"]

_LARGEST = 1e300
"""Larger numbers are drawn at the edge: the difference of two floats beyond it may overflow."""

_SMALLEST = 1e-290
"""Numbers that are all smaller are drawn as 0: below about 1e-308 floats lose their digits."""


@dataclass(frozen=True)
class Scale:
    """Linear map from data in [low, high] to pixels in [start, end]; `start` may be the larger (SVG's y runs down).

    >>> Scale(0.0, 10.0, 100.0, 300.0)(5.0)
    200.0
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def bounded(value: float) -> float:
    """Clip a finite number to ±1e300, so that the difference of two of them is finite.

    >>> bounded(-1.7e308), bounded(3.0)
    (-1e+300, 3.0)
    """
    return min(max(value, -_LARGEST), _LARGEST)


def widened(low: float, high: float, room: float | None = None) -> tuple[float, float]:
    """Return [low, high] where floating point can divide it into ticks, else a range around it that can be divided.

    Args:
        low, high: finite, low <= high; clipped to ±1e300.
        room: how much to add on both sides of a single value; by default half of it, or 0.5 for 0.

    >>> widened(4.0, 4.0), widened(0.0, 1e-14)
    ((2.0, 6.0), (0.0, 1e-14))
    """
    low, high = bounded(low), bounded(high)
    size = max(abs(low), abs(high))
    if high - low > 1e-12 * size and size > _SMALLEST:
        return low, high
    # Half of a denormal number is denormal too, and its power of ten is not representable. A room too small for the size of
    # the numbers (1 at 9e15) would leave a range that ticks cannot divide either.
    if room is None or 2 * room <= 1e-12 * size:
        room = size / 2 if size > _SMALLEST else 0.5
    return bounded(low - room), bounded(high + room)


def _step(low: float, high: float, target: int, whole: bool) -> float:
    rough = (high - low) / max(1, target)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if rough <= m * power * (1 + 1e-9)), 10 * power)
    return max(1.0, step) if whole else step


def _rounded(value: float, step: float) -> float:
    """Drop the rounding error of a multiple of `step`: 0.30000000000000004 becomes 0.3, and 3e-14 stays."""
    return round(value, 12 - math.floor(math.log10(step)))


def nice_ticks(low: float, high: float, target: int = 5, *, whole: bool = False) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten within [low, high], about `target` steps of them.

    Args:
        low, high: the range to cover, low < high, as `widened` or `nice_range` returns it.
        target: the desired number of steps; there may be fewer.
        whole: keep to whole numbers (training steps).

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    step = _step(low, high, target, whole)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [_rounded(k * step, step) for k in range(first, last + 1)]


def nice_range(low: float, high: float, target: int = 5) -> tuple[float, float]:
    """Widen [low, high] to whole ticks; a single value gets room on both sides.

    The result is never empty. Rounding is relative to the step: rounding to a fixed number of decimals made the range of
    6e-14 empty, and the chart of an on-policy run impossible.

    >>> nice_range(0.13, 0.88), nice_range(0.0, 6e-14)
    ((0.0, 1.0), (0.0, 6e-14))
    """
    low, high = widened(low, high)
    step = _step(low, high, target, whole=False)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return _rounded(bottom, step), _rounded(top, step)


def tick_text(value: float, step: float, *, as_percent: bool = False) -> str:
    """Write a tick with just the decimals its step needs.

    >>> tick_text(0.5, 0.25), tick_text(0.25, 0.25, as_percent=True), tick_text(20000, 5000)
    ('0.50', '25%', '20k')
    >>> tick_text(3e-14, 1e-14), tick_text(0.50002, 0.00002), tick_text(2e12, 1e12)
    ('3e-14', '0.50002', '2e+12')
    """
    if as_percent:
        return f"{tick_text(value * 100, step * 100)}%"
    # Digits that tell this tick from its neighbours.
    digits = max(2, math.floor(math.log10(abs(value) / step)) + 1) if abs(value) > step else 2
    if max(abs(value), step) >= 1e9:
        return f"{value:.{digits}g}"
    if (abs(value) >= 1e4 or step >= 1e4) and digits <= 6:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    decimals = 0
    while decimals < 5 and abs(round(step, decimals) - step) > 1e-6 * step:
        decimals += 1
    return f"{value:.{digits}g}" if step < 1e-4 else f"{value:.{decimals}f}"
