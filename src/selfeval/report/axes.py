"""Scales, ticks and tick labels of the charts."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Scale", "bounded", "nice_range", "nice_ticks", "tick_text", "widened"]

_LARGEST = 1e300
"""Numbers are clipped to this magnitude, because the difference of two larger floats may overflow."""

_SMALLEST = 1e-290
"""If all numbers are smaller they are drawn as 0, because floats below about 1e-308 lose their digits."""


@dataclass(frozen=True)
class Scale:
    """Linear map from data in [low, high] to pixels in [start, end]; `start` may exceed `end`, because SVG's y points down.

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
    """Clip a finite number to ±1e300; the difference of two clipped numbers is finite.

    >>> bounded(-1.7e308), bounded(3.0)
    (-1e+300, 3.0)
    """
    return min(max(value, -_LARGEST), _LARGEST)


def widened(low: float, high: float, room: float | None = None) -> tuple[float, float]:
    """Return [low, high] if floating point can divide it into ticks, otherwise a wider range that it can divide.

    Args:
        low, high: finite, low <= high; clipped to ±1e300.
        room: Optional. Margin on both sides of a single value. Default: half of the value, or 0.5 for 0.

    >>> widened(4.0, 4.0), widened(0.0, 1e-14)
    ((2.0, 6.0), (0.0, 1e-14))
    """
    low, high = bounded(low), bounded(high)
    size = max(abs(low), abs(high))
    if high - low > 1e-12 * size and size > _SMALLEST:
        return low, high
    # Half of a denormal number is denormal too, and its power of ten is not representable. A margin that is tiny relative to
    # the numbers (1 at 9e15) would also leave a range that ticks cannot divide.
    if room is None or 2 * room <= 1e-12 * size:
        room = size / 2 if size > _SMALLEST else 0.5
    return bounded(low - room), bounded(high + room)


def _step(low: float, high: float, target: int, whole: bool) -> float:
    rough = (high - low) / max(1, target)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if rough <= m * power * (1 + 1e-9)), 10 * power)
    return max(1.0, step) if whole else step


def _rounded(value: float, step: float) -> float:
    """Remove the rounding error of a multiple of `step`: 0.30000000000000004 becomes 0.3, but 3e-14 is kept."""
    return round(value, 12 - math.floor(math.log10(step)))


def nice_ticks(low: float, high: float, target: int = 5, *, whole: bool = False) -> list[float]:
    """Return ticks in [low, high] at multiples of 1, 2 or 5 times a power of ten, with about `target` steps.

    Args:
        low, high: the range to cover, low < high, as returned by `widened` or `nice_range`.
        target: desired number of steps; there may be fewer. Default: 5.
        whole: restrict ticks to whole numbers (training steps). Default: False.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    step = _step(low, high, target, whole)
    # The tolerance keeps a tick that rounding has put just outside the range.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [_rounded(k * step, step) for k in range(first, last + 1)]


def nice_range(low: float, high: float, target: int = 5) -> tuple[float, float]:
    """Widen [low, high] to whole ticks; a single value gets a margin on both sides.

    The result is never empty. Rounding is relative to the step: rounding to a fixed number of decimals would make a range of
    6e-14 empty, as occurs for the ratio of an on-policy run.

    >>> nice_range(0.13, 0.88), nice_range(0.0, 6e-14)
    ((0.0, 1.0), (0.0, 6e-14))
    """
    low, high = widened(low, high)
    step = _step(low, high, target, whole=False)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return _rounded(bottom, step), _rounded(top, step)


def tick_text(value: float, step: float, *, as_percent: bool = False) -> str:
    """Format a tick with the decimals that its step needs.

    >>> tick_text(0.5, 0.25), tick_text(0.25, 0.25, as_percent=True), tick_text(20000, 5000)
    ('0.50', '25%', '20k')
    >>> tick_text(3e-14, 1e-14), tick_text(0.50002, 0.00002), tick_text(2e12, 1e12)
    ('3e-14', '0.50002', '2e+12')
    """
    if as_percent:
        return f"{tick_text(value * 100, step * 100)}%"
    # Enough digits to distinguish this tick from its neighbours.
    digits = max(2, math.floor(math.log10(abs(value) / step)) + 1) if abs(value) > step else 2
    if max(abs(value), step) >= 1e9:
        return f"{value:.{digits}g}"
    if (abs(value) >= 1e4 or step >= 1e4) and digits <= 6:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    # The fewest decimals that still show the step.
    decimals = 0
    while decimals < 5 and abs(round(step, decimals) - step) > 1e-6 * step:
        decimals += 1
    return f"{value:.{digits}g}" if step < 1e-4 else f"{value:.{decimals}f}"
