"""Charts as inline SVG strings, without scripts, fonts or ids that could clash on a page.

Colours are CSS classes (`c1` to `c4`, defined by the page for light and dark mode). Series also differ by dash, so no
information is conveyed by colour alone. Each chart has an `aria-label` that describes it, and `<title>` tooltips; hover marks
are plain CSS. There is no JavaScript, so there is no zooming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from selfeval.report.axes import Scale, bounded, nice_range, nice_ticks, tick_text, widened
from selfeval.report.figures import number, percent

__all__ = [
    "Bar",
    "Bin",
    "Frame",
    "Line",
    "Mark",
    "Part",
    "Track",
    "bar_chart",
    "interval_tracks",
    "line_chart",
    "reliability_chart",
    "risk_coverage_chart",
    "smooth",
    "stacked_bar",
    "thinned",
]

Point = tuple[float, float]
Matrix: TypeAlias = NDArray[np.float64]

WIDTH = 360
"""Width of each chart in SVG units, about its width in pixels on a phone, so text is not scaled there."""

MOST_PROBES = 80
MOST_POINTS = 600
MOST_NEIGHBOURS = 81
_FITS_AT_ONCE = 1024
"""Local fits in one operation; a larger number needs more memory and is no faster."""
DOTS_UP_TO = 15

LEGEND_ROW = 16
"""Height of a row of the legend; the read-out has a separate row above."""

LEGEND_LETTER = 6.2
"""Width reserved per letter of a legend, in SVG units; the font size is 11."""


@dataclass(frozen=True)
class Line:
    """A series of points in order of x.

    `band` has (low, high) for each point. With a `smoothing` in (0, 1], the span of `smooth`, a smoothed line is drawn over a
    thin line of the raw values. `order` is the number of its colour and dash, from 0. Default: its place in the chart.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[Point] | None = None
    smoothing: float = 0.0
    order: int | None = None


@dataclass(frozen=True)
class Mark:
    """An event at `x`, drawn as a dashed vertical line with a tooltip."""

    x: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A bar, with the ends of its interval if they are known, and the text at its right end."""

    name: str
    value: float
    low: float | None
    high: float | None
    text: str
    accent: bool = False


@dataclass(frozen=True)
class Track:
    """An interval on a thin track, as shown in the headline."""

    name: str
    value: float
    low: float | None
    high: float | None
    accent: bool = False


@dataclass(frozen=True)
class Part:
    """A part of a stacked bar; `style` is its colour class."""

    name: str
    amount: float
    style: str


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: mean confidence, accuracy, number of cases."""

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Frame:
    """The plotting area: its two scales and the format of the ticks."""

    x: Scale
    y: Scale
    x_percent: bool = False
    y_percent: bool = False

    @classmethod
    def over(cls, x: Point, y: Point, *, top: float = 24.0, x_percent: bool = False, y_percent: bool = False) -> Frame:
        """Fit the ranges `x` and `y` into a chart of the default size; the space above `top` has the read-out and legend."""
        return cls(Scale(*x, 46.0, WIDTH - 12.0), Scale(*y, top + 154.0, top), x_percent, y_percent)


def smooth(points: Sequence[Point], span: float) -> list[Point]:
    """Smooth a series by local linear regression (LOWESS without its robust passes), for display only.

    Unlike a running average it neither lags behind a trend nor flattens its ends.

    Formula: at each x, the least-squares line with weights (1 - d^3)^3, d the distance relative to the farthest neighbour.
    Paper: Cleveland 1979, Robust locally weighted regression and smoothing scatterplots.

    Args:
        points: in order of x.
        span: share of the points in each local fit, in (0, 1]; at least 3 and at most `MOST_NEIGHBOURS` points are used.

    >>> smooth([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0)], 1.0)
    [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 7.0)]
    """
    # Capped, so the time grows linearly with the number of points.
    wide = min(len(points), MOST_NEIGHBOURS, max(3, round(span * len(points))))
    # Rescale by a power of two, which is exact, because squares of huge or tiny values would overflow or underflow.
    unit = math.ldexp(1.0, math.frexp(max(abs(y) for _, y in points))[1]) if points else 1.0
    xs, ys = np.array([x for x, _ in points]), np.array([y / unit for _, y in points])
    starts, start = [], 0
    for x, _ in points:
        # Slide the window while the next point on the right is nearer than the leftmost one.
        while start + wide < len(points) and points[start + wide][0] - x < x - points[start][0]:
            start += 1
        starts.append(start)
    calm: list[float] = []
    for first in range(0, len(points), _FITS_AT_ONCE):
        near_BN = np.array(starts[first : first + _FITS_AT_ONCE])[:, None] + np.arange(wide)
        calm += _local_fits(xs[near_BN] - xs[first : first + _FITS_AT_ONCE, None], ys[near_BN]).round(12).tolist()
    return [(x, y * unit) for (x, _), y in zip(points, calm, strict=True)]


def _local_fits(distances_BN: Matrix, values_BN: Matrix) -> Matrix:
    """Return the value at distance 0 of the weighted line through each row of N points, `[B]`."""
    # Slightly more than the farthest neighbour, whose weight would otherwise be 0.
    reach_B1 = np.abs(distances_BN).max(axis=1, keepdims=True) * 1.0001
    offsets_BN = distances_BN / np.where(reach_B1 > 0, reach_B1, 1.0)
    weights_BN = (1 - np.abs(offsets_BN) ** 3) ** 3
    weights_BN /= weights_BN.sum(axis=1, keepdims=True)
    middle_B1 = (weights_BN * offsets_BN).sum(axis=1, keepdims=True)
    level_B1 = (weights_BN * values_BN).sum(axis=1, keepdims=True)
    spread_B = (weights_BN * (offsets_BN - middle_B1) ** 2).sum(axis=1)
    rise_B = (weights_BN * (offsets_BN - middle_B1) * (values_BN - level_B1)).sum(axis=1)
    # All neighbours have the same x: no slope can be fitted, and `rise_B` is 0 as well.
    slope_B = rise_B / np.where(spread_B > 0, spread_B, 1.0)
    found_B: Matrix = level_B1[:, 0] - slope_B * middle_B1[:, 0]
    return found_B


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str = "step",
    y_range: Point | None = None,
    x_range: Point | None = None,
    percent_axes: str = "",
    marks: Sequence[Mark] = (),
    reference: float | None = None,
    whole_x: bool = True,
) -> str:
    """Draw one or more series over a common x axis, with ticks and a hover read-out.

    Args:
        lines: the series, each with at least one point, all finite. Numbers beyond ±1e300 are drawn at the edge.
        label: description of the chart, at the start of the `aria-label`.
        x_label: label of the x axis, also used in the read-out.
        y_range, x_range: Optional. Fixed ranges. Default: the range of the data.
        percent_axes: axes to format as percentages: "x", "y" or "xy". Default: none.
        marks: events to draw as vertical lines. Default: none.
        reference: Optional. Level to draw as a dashed horizontal line.
        whole_x: restrict the ticks of x to whole numbers. Default: True, because x usually counts steps.

    Raises:
        ValueError: a series has no points.
    """
    if not lines or any(not line.points for line in lines):
        raise ValueError("a line chart needs at least one point in every series")
    lines = [replace(_bounded(line), order=_order(line, place)) for place, line in enumerate(lines)]
    rows = _legend_rows(lines)
    x, y = widened(*x_range) if x_range else _x_range(lines), widened(*y_range) if y_range else _y_range(lines)
    top = 24 + LEGEND_ROW * len(rows)
    frame = Frame.over(x, y, top=top, x_percent="x" in percent_axes, y_percent="y" in percent_axes)
    body = [_axes(frame, x_label, whole_x=whole_x and "x" not in percent_axes)]
    if reference is not None:
        body.append(_level(frame, reference))
    body += [_mark(frame, mark) for mark in marks if frame.x.low <= mark.x <= frame.x.high]
    body += [_series(frame, line) for line in lines]
    body.append(_legend(rows))
    body.append(_probes(frame, lines, x_label))
    return _svg("".join(body), 210 + LEGEND_ROW * len(rows), f"{label}. {_in_words(frame, lines, x_label)}")


def risk_coverage_chart(points: Sequence[Point], *, label: str = "Risk over coverage") -> str:
    """Draw the error rate among answered cases (risk) over the share of cases answered (coverage).

    Args:
        points: (coverage, risk), both in [0, 1], in any order.
        label: Optional. Description of the chart for the `aria-label`.
    """
    ordered = sorted(points)
    top = nice_range(0.0, max(risk for _, risk in ordered) or 0.05)[1]
    band = [(0.0, risk) for _, risk in ordered]
    line = Line("error rate", ordered, band=band)
    return line_chart(
        [line], label=label, x_label="coverage", x_range=(0.0, 1.0), y_range=(0.0, min(1.0, top)), percent_axes="xy"
    )


def reliability_chart(bins: Sequence[Bin], *, label: str = "Accuracy over confidence") -> str:
    """Draw a reliability diagram: accuracy over confidence, with the diagonal of perfect calibration.

    The stem of each dot is its distance from the diagonal, and its area grows with the number of cases in the bin.

    Args:
        bins: the non-empty bins.
        label: Optional. Description of the chart for the `aria-label`.

    Raises:
        ValueError: there are no bins.
    """
    if not bins:
        raise ValueError("a reliability diagram needs at least one bin with cases in it")
    lowest = min(min(b.confidence, b.accuracy) for b in bins)
    # Confidences of a comparison start at 0.5; other data get the next lower quarter.
    low = 0.5 if lowest >= 0.5 else math.floor(lowest * 4) / 4
    frame = Frame.over((low, 1.0), (low, 1.0), x_percent=True, y_percent=True)
    corner, end = (frame.x(low), frame.y(low)), (frame.x(1.0), frame.y(1.0))
    body = [_axes(frame, "confidence", whole_x=False), _rule(*corner, *end, "reference")]
    most = max(b.n for b in bins) or 1
    for b in bins:
        x, y, radius = frame.x(b.confidence), frame.y(b.accuracy), 2.5 + 5.5 * math.sqrt(b.n / most)
        text = f"confidence {percent(b.confidence)}: right {percent(b.accuracy)} (n = {b.n:,})"
        body.append(_rule(x, frame.y(b.confidence), x, y, "stem"))
        body.append(_tag("circle", f"<title>{escape(text)}</title>", class_="dot c1", cx=x, cy=y, r=radius))
    in_words = "; ".join(f"{percent(b.confidence)} confident, {percent(b.accuracy)} right" for b in bins)
    return _svg("".join(body), 210, f"{label}. {in_words}")


def bar_chart(
    bars: Sequence[Bar],
    *,
    label: str,
    low: float = 0.0,
    high: float = 1.0,
    reference: float | None = None,
    as_percent: bool = True,
) -> str:
    """Draw horizontal bars that start at `low`, with their names above and their intervals as error bars.

    Args:
        bars: top to bottom; accented bars have the first colour, the others are grey.
        label: description of the chart, at the start of the `aria-label`.
        low, high: ends of the axis.
        reference: Optional. Value to mark with a dashed line (chance level, no change).
        as_percent: format the ticks as percentages.

    Raises:
        ValueError: there are no bars.
    """
    if not bars:
        raise ValueError("a bar chart needs at least one bar")
    x = Scale(low, high, 2.0, WIDTH - 14.0)
    bottom = 40 * len(bars) + 6
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    body = []
    for tick in ticks:
        anchor = "start" if x(tick) < 12 else "middle"
        body.append(_rule(x(tick), bottom - 4, x(tick), bottom, "axis"))
        body.append(_text(x(tick), bottom + 14, tick_text(tick, step, as_percent=as_percent), "tick", anchor))
    body.append(_rule(x.start, bottom, x.end, bottom, "axis"))
    for row, bar in enumerate(bars):
        body.append(_bar(x, bar, 40.0 * row))
        if reference is not None:
            body.append(_rule(x(reference), 40 * row + 18, x(reference), 40 * row + 36, "reference"))
    return _svg("".join(body), bottom + 20, f"{label}. " + "; ".join(f"{bar.name}: {bar.text}" for bar in bars))


def interval_tracks(tracks: Sequence[Track], *, label: str, reference: float | None = None) -> str:
    """Draw each interval as a thick stroke on a thin track from 0% to 100%, with a dot at its value.

    Args:
        tracks: top to bottom.
        label: description of the picture for the `aria-label`.
        reference: Optional. Value to mark across all tracks.
    """
    x = Scale(0.0, 1.0, 82.0, 292.0)
    bottom = 22 * len(tracks)
    body = [_text(x(tick), bottom + 12, f"{tick:.0%}", "tick", "middle") for tick in (0.0, 0.5, 1.0)]
    if reference is not None:
        body.append(_rule(x(reference), 2, x(reference), bottom - 2, "reference"))
    for row, track in enumerate(tracks):
        y, colour = 22.0 * row + 11, "c1" if track.accent else "c0"
        parts = [_text(0, y + 4, track.name, "tick", "start"), _rule(x.start, y, x.end, y, "track")]
        if track.low is not None and track.high is not None:
            parts.append(_rule(x(track.low), y, x(track.high), y, f"span {colour}"))
        parts.append(_tag("circle", class_=f"dot {colour}", cx=x(track.value), cy=y, r=4.5))
        body.append(f"<g><title>{escape(track.name)}: {percent(track.value)}</title>{''.join(parts)}</g>")
    return _svg("".join(body), bottom + 16, label, width=300)


def stacked_bar(parts: Sequence[Part], *, label: str) -> str:
    """Draw parts of a whole as a stacked bar; the page lists names and amounts in a table next to it.

    Args:
        parts: left to right; parts of amount 0 are skipped.
        label: description of the bar, at the start of the `aria-label`.

    Raises:
        ValueError: the parts sum to 0.
    """
    whole = sum(part.amount for part in parts)
    if whole <= 0:
        raise ValueError("a stacked bar needs a part that is larger than zero")
    at, body = 0.0, []
    for part in parts:
        if part.amount <= 0:
            continue
        wide = 1000.0 * part.amount / whole
        in_words = f"{part.name}: {number(part.amount) if part.amount % 1 else f'{part.amount:,.0f}'}"
        title = f"<title>{escape(in_words)} ({percent(part.amount / whole)})</title>"
        body.append(_tag("rect", title, class_=f"part {part.style}", x=at, y=0, width=wide, height=20))
        at += wide
    in_words = "; ".join(f"{part.name} {percent(part.amount / whole)}" for part in parts)
    return (
        f'<svg class="stack" role="img" aria-label="{escape(f"{label}. {in_words}")}" viewBox="0 0 1000 20" '
        f'preserveAspectRatio="none">{"".join(body)}</svg>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """Downsample to about `MOST_POINTS` points, keeping the lowest and the highest point of each segment.

    Spikes are kept, because a curve must not hide the step at which training went wrong.
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    # Two points are kept per segment.
    stretch = math.ceil(len(points) / (MOST_POINTS / 2))
    keep = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        inside = range(start, min(start + stretch, len(points)))
        keep |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(keep)]


def _bounded(line: Line) -> Line:
    points = [(bounded(x), bounded(y)) for x, y in line.points]
    band = None if line.band is None else [(bounded(low), bounded(high)) for low, high in line.band]
    return replace(line, points=points, band=band)


def _x_range(lines: Sequence[Line]) -> Point:
    xs = [x for line in lines for x, _ in line.points]
    return widened(min(xs), max(xs), room=1.0)


def _y_range(lines: Sequence[Line]) -> Point:
    ys = [y for line in lines for _, y in line.points]
    ys += [end for line in lines for pair in line.band or () for end in pair]
    return nice_range(min(ys), max(ys))


def _axes(frame: Frame, x_label: str, *, whole_x: bool) -> str:
    x, y = frame.x, frame.y
    ticks = nice_ticks(y.low, y.high)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    body = []
    for tick in ticks:
        body.append(_rule(x.start, y(tick), x.end, y(tick), "grid"))
        body.append(_text(x.start - 6, y(tick) + 4, tick_text(tick, step, as_percent=frame.y_percent), "tick", "end"))
    body.append(_rule(x.start, y.start, x.end, y.start, "axis"))
    across = nice_ticks(x.low, x.high, whole=whole_x)
    step = across[1] - across[0] if len(across) > 1 else 1.0
    for tick in across:
        body.append(_rule(x(tick), y.start, x(tick), y.start + 4, "axis"))
        body.append(_text(x(tick), y.start + 16, tick_text(tick, step, as_percent=frame.x_percent), "tick", "middle"))
    body.append(_text((x.start + x.end) / 2, y.start + 29, x_label, "tick", "middle"))
    return "".join(body)


def _order(line: Line, place: int = 0) -> int:
    return place if line.order is None else line.order


def _series(frame: Frame, line: Line) -> str:
    order = _order(line)
    colour = f"c{order % 4 + 1}"
    body = []
    if line.band is not None:
        edge = [(x, low) for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
        back = [(x, high) for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
        # Along the lower ends and back along the upper ends.
        path = f"M{_path(frame, edge)}L{_path(frame, back[::-1])}Z"
        body.append(_tag("path", class_=f"band {colour}", d=path))
    dashed = " dashed" if order else ""
    if line.smoothing and len(line.points) > 2:
        calm = thinned(smooth(line.points, line.smoothing))
        body.append(_tag("path", class_=f"line raw {colour}", d=f"M{_path(frame, thinned(line.points))}"))
        body.append(_tag("path", class_=f"line {colour}{dashed}", d=f"M{_path(frame, calm)}"))
    else:
        body.append(_tag("path", class_=f"line {colour}{dashed}", d=f"M{_path(frame, thinned(line.points))}"))
        if len(line.points) <= DOTS_UP_TO:
            body += [_dot(frame, point, order, 2.5) for point in line.points]
    return "".join(body)


def _dot(frame: Frame, point: Point, order: int, radius: float) -> str:
    x, y = point
    return _tag("circle", class_=f"dot c{order % 4 + 1}", cx=frame.x(x), cy=_inside(frame, y), r=radius)


def _probes(frame: Frame, lines: Sequence[Line], x_label: str) -> str:
    """Return invisible vertical strips that show the points and their values when hovered."""
    xs = sorted({x for line in lines for x, _ in line.points})
    stride = math.ceil(len(xs) / MOST_PROBES)
    # The last step is always kept, whatever the stride.
    xs = sorted({*xs[::stride], xs[-1]})
    values = [(_order(line), dict(line.points)) for line in lines]
    # Strips meet halfway between neighbouring points.
    edges = [frame.x.start, *((frame.x(a) + frame.x(b)) / 2 for a, b in pairwise(xs)), frame.x.end]
    bottom, top, body = frame.y.end, frame.y.start, []
    for x, left, right in zip(xs, edges[:-1], edges[1:], strict=True):
        here = [(order, at[x]) for order, at in values if x in at]
        text = f"{x_label} {_value(x, frame.x_percent)}: " + ", ".join(_value(y, frame.y_percent) for _, y in here)
        dots = "".join(_dot(frame, (x, y), order, 3.5) for order, y in here)
        hit = _tag("rect", class_="hit", x=left, y=bottom, width=max(0.0, right - left), height=top - bottom)
        cross = _rule(frame.x(x), bottom, frame.x(x), top, "cross")
        words = _text(frame.x.end, 14, text, "readout", "end")
        body.append(f'<g class="probe"><title>{escape(text)}</title>{hit}{cross}{dots}{words}</g>')
    last = ", ".join(_value(line.points[-1][1], frame.y_percent) for line in lines)
    return _text(frame.x.end, 14, f"last {last}", "readout last", "end") + "".join(body)


def _value(value: float, as_percent: bool) -> str:
    return percent(value) if as_percent else f"{value:,.0f}" if abs(value) < 1e9 and value % 1 == 0 else number(value)


def _in_words(frame: Frame, lines: Sequence[Line], x_label: str) -> str:
    said = []
    for line in lines:
        (x0, y0), (x1, y1) = line.points[0], line.points[-1]
        said.append(
            f"{line.name}: {_value(y0, frame.y_percent)} at {x_label} {_value(x0, frame.x_percent)}, "
            f"{_value(y1, frame.y_percent)} at {x_label} {_value(x1, frame.x_percent)}"
        )
    return "; ".join(said)


def _legend_rows(lines: Sequence[Line]) -> list[list[tuple[float, int, str]]]:
    """Lay out the names of the series in rows as wide as the chart: (x, index of the series, name); empty for one series."""
    rows: list[list[tuple[float, int, str]]] = []
    at = math.inf
    for line in lines if len(lines) > 1 else []:
        wide = 33 + LEGEND_LETTER * len(line.name)
        # `at` starts at infinity, so the first name opens the first row.
        if at + wide > WIDTH:
            at = 46.0
            rows.append([])
        rows[-1].append((at, _order(line), line.name))
        at += wide
    return rows


def _legend(rows: Sequence[Sequence[tuple[float, int, str]]]) -> str:
    body = []
    for y, row in enumerate(rows, start=1):
        for at, order, name in row:
            dashed = " dashed" if order else ""
            body.append(_rule(at, 10 + LEGEND_ROW * y, at + 16, 10 + LEGEND_ROW * y, f"line c{order % 4 + 1}{dashed}"))
            body.append(_text(at + 21, 14 + LEGEND_ROW * y, name, "tick", "start"))
    return "".join(body)


def _bar(x: Scale, bar: Bar, top: float) -> str:
    end, colour = min(max(bar.value, x.low), x.high), "c1" if bar.accent else "c0"
    parts = [
        f"<title>{escape(f'{bar.name}: {bar.text}')}</title>",
        _text(x.start, top + 15, bar.name, "name", "start"),
        _text(x.end, top + 15, bar.text, "amount", "end"),
        _tag("rect", class_=f"bar {colour}", x=x.start, y=top + 21, width=x(end) - x.start, height=12),
        _rule(x(end), top + 21, x(end), top + 33, f"edge {colour}"),
    ]
    if bar.low is not None and bar.high is not None:
        left, right, y = x(max(bar.low, x.low)), x(min(bar.high, x.high)), top + 27
        path = f"M{_n(left)} {_n(y - 4)}V{_n(y + 4)}M{_n(left)} {_n(y)}H{_n(right)}M{_n(right)} {_n(y - 4)}V{_n(y + 4)}"
        parts.append(_tag("path", class_="whisker", d=path))
    return f"<g>{''.join(parts)}</g>"


def _mark(frame: Frame, mark: Mark) -> str:
    x = frame.x(mark.x)
    return f"<g><title>{escape(mark.text)}</title>{_rule(x, frame.y.end, x, frame.y.start, 'mark')}</g>"


def _level(frame: Frame, value: float) -> str:
    if not frame.y.low <= value <= frame.y.high:
        return ""
    return _rule(frame.x.start, frame.y(value), frame.x.end, frame.y(value), "reference")


def _inside(frame: Frame, y: float) -> float:
    """Clip a point outside a fixed range to the edge, where it is still visible."""
    return frame.y(min(max(y, frame.y.low), frame.y.high))


def _path(frame: Frame, points: Sequence[Point]) -> str:
    return "L".join(f"{_n(frame.x(x))} {_n(_inside(frame, y))}" for x, y in points)


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _tag(name: str, inside: str = "", **attributes: str | float) -> str:
    """Return an SVG element; a trailing underscore in the name of an attribute is dropped (`class_`)."""
    written = "".join(
        f' {key.rstrip("_")}="{escape(value) if isinstance(value, str) else _n(value)}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{inside}</{name}>"


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return _tag("line", class_=style, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(x: float, y: float, words: str, style: str, anchor: str) -> str:
    return f'<text class="{style} {anchor}" x="{_n(x)}" y="{_n(y)}">{escape(words)}</text>'


def _svg(body: str, height: int, label: str, *, width: int = WIDTH) -> str:
    return f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}">{body}</svg>'
