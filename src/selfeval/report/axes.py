"""Scales, ticks and tick labels: the arithmetic under every chart."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Scale", "nice_range", "nice_ticks", "tick_text"]


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


def _step(low: float, high: float, target: int, whole: bool) -> float:
    rough = (high - low) / max(1, target)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if rough <= m * power * (1 + 1e-9))
    return max(1.0, step) if whole else step


def nice_ticks(low: float, high: float, target: int = 5, *, whole: bool = False) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten that lie in [low, high], about `target` steps of them.

    Args:
        low, high: the range to cover, low < high.
        target: the wished number of steps; there may be fewer.
        whole: keep to whole numbers (training steps).

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    step = _step(low, high, target, whole)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def nice_range(low: float, high: float, target: int = 5) -> tuple[float, float]:
    """Widen [low, high] to whole ticks; a single value gets room on both sides.

    >>> nice_range(0.13, 0.88)
    (0.0, 1.0)
    """
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    step = _step(low, high, target, whole=False)
    bottom, top = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return round(bottom, 12), round(top, 12)


def tick_text(value: float, step: float, *, as_percent: bool = False) -> str:
    """Write a tick with just the decimals its step needs.

    >>> tick_text(0.5, 0.25), tick_text(0.25, 0.25, as_percent=True), tick_text(20000, 5000)
    ('0.50', '25%', '20k')
    """
    if as_percent:
        return f"{tick_text(value * 100, step * 100)}%"
    if abs(value) >= 1e4 or step >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    decimals = 0
    while decimals < 5 and abs(round(step, decimals) - step) > 1e-6 * step:
        decimals += 1
    return f"{value:.2g}" if step < 1e-4 else f"{value:.{decimals}f}"
