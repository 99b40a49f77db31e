"""Read figures out of `report.json`, and write numbers the way a person reads them.

A figure is `{"value", "ci_low", "ci_high", "n"}` or null. Whatever was not measured is `None` here, never zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from selfeval.errors import InputError

__all__ = [
    "NOT_MEASURED",
    "Figure",
    "cells",
    "count",
    "describe",
    "duration",
    "finite",
    "number",
    "percent",
    "read_figure",
    "section",
    "size",
]

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Figure:
    """One measured quantity: its value, its interval (which may be unknown) and the number of cases behind it."""

    value: float
    ci_low: float | None
    ci_high: float | None
    n: int

    def above(self, other: Figure | float) -> bool:
        """Whether this whole interval lies above `other` (a figure's interval, or a constant)."""
        bound = other.ci_high if isinstance(other, Figure) else other
        return self.ci_low is not None and bound is not None and self.ci_low > bound

    def below(self, other: Figure | float) -> bool:
        """Whether this whole interval lies below `other` (a figure's interval, or a constant)."""
        bound = other.ci_low if isinstance(other, Figure) else other
        return self.ci_high is not None and bound is not None and self.ci_high < bound


def finite(value: object) -> float | None:
    """Return `value` as a float when it is a finite number, else None (booleans are not numbers here)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        known = float(value)
    except OverflowError:  # JSON allows whole numbers that no float can hold
        return None
    return known if math.isfinite(known) else None


def section(report: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the object at a dotted `path` of the report, or an empty one when it is absent or null.

    Raises:
        InputError: something other than an object stands there.
    """
    here: Any = report
    for key in path.split("."):
        here = here.get(key)
        if here is None:
            return {}
        if not isinstance(here, dict):
            raise InputError(f"report.json: {path!r} should be an object, got {type(here).__name__}")
    found: dict[str, Any] = here
    return found


def read_figure(report: dict[str, Any], path: str) -> Figure | None:
    """Return the figure at a dotted `path`, or None when it is absent, null, or has no finite value.

    Raises:
        InputError: something other than a figure stands there.
    """
    raw = section(report, path)
    if not raw:
        return None
    if "value" not in raw:
        raise InputError(f"report.json: {path!r} should have value, ci_low, ci_high and n, got {sorted(raw)}")
    value, cases = finite(raw["value"]), finite(raw.get("n"))
    if value is None:
        return None
    return Figure(value, finite(raw.get("ci_low")), finite(raw.get("ci_high")), int(cases or 0))


def percent(value: float) -> str:
    """Write a share as a percentage.

    >>> percent(0.9312), percent(1e20)
    ('93.1%', '1e+22%')
    """
    return f"{value * 100:.1f}%" if abs(value) < 1e9 else f"{value * 100:.2g}%"


def number(value: float) -> str:
    """Write a number with three significant digits, and none of them scientific where a person would not.

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
    """Write a whole number with thousands marks, or say that it was not measured.

    >>> count(16000), count(None)
    ('16,000', 'not measured')
    """
    known = finite(value)
    return NOT_MEASURED if known is None else f"{round(known):,}"


def duration(seconds: float) -> str:
    """Write seconds in the units that a person would use.

    >>> duration(12.34), duration(231.0), duration(7505.0)
    ('12.3 s', '3 min 51 s', '2 h 05 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(octets: float) -> str:
    """Write bytes in binary units.

    >>> size(900), size(3_300_000), size(14 * 2**30)
    ('900 bytes', '3.15 MiB', '14.0 GiB')
    """
    if octets < 1024:
        return f"{octets:.0f} bytes"
    power = min(3, int(math.log(octets, 1024)))
    return f"{number(octets / 1024**power)} {('KiB', 'MiB', 'GiB')[power - 1]}"


def cells(figure: Figure | None, *, as_percent: bool = True) -> tuple[str, str, str]:
    """Write a figure as three cells of a table: its value, its interval, its n.

    >>> cells(Figure(1.04, 1.03, 1.05, 1800), as_percent=False)
    ('1.04', '1.03 to 1.05', '1,800')
    """
    if figure is None:
        return NOT_MEASURED, "", ""
    write = percent if as_percent else number
    if figure.ci_low is None or figure.ci_high is None:
        return write(figure.value), "unknown", count(figure.n)
    return write(figure.value), f"{write(figure.ci_low)} to {write(figure.ci_high)}", count(figure.n)


def describe(figure: Figure | None, *, as_percent: bool = True, of: str = "") -> str:
    """Write a figure with its interval and n, or say that it was not measured; `of` follows the value itself.

    >>> describe(Figure(0.931, 0.912, 0.946, 800), of=" of pairs")
    '93.1% of pairs (interval 91.2% to 94.6%, n = 800)'
    """
    if figure is None:
        return NOT_MEASURED
    value, interval, n = cells(figure, as_percent=as_percent)
    known = "no interval" if interval == "unknown" else f"interval {interval}"
    return f"{value}{of} ({known}, n = {n})"
