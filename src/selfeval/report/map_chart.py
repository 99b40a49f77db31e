"""The map of the domain as an inline SVG, without a script: colours are chosen by the page's style sheet, texts are tooltips.

Kinds differ by shape and clusters by a number, so no information is conveyed by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from selfeval.report.map_points import MapPoint

__all__ = ["COLOURS", "map_chart", "ordered_points"]

WIDTH, HEIGHT, MARGIN = 360, 270, 10
LEVELS = (0.5, 0.8, 0.95)
"""Limits of the four levels of shares."""
CONFIDENCE_LEVELS = (0.6, 0.75, 0.9)
COLOURS = 8
"""Colours of clusters; further clusters begin again with the first one."""

_KINDS = {"seed": "seed", "train": "training question", "test": "test question", "dropped": "dropped question"}


def ordered_points(points: Sequence[MapPoint]) -> list[MapPoint]:
    """Return the points in the order in which they are drawn and read: by cluster, from left to right."""
    return sorted(points, key=lambda p: (p.cluster, p.x, p.y, p.text))


def map_chart(points: Sequence[MapPoint], names: Sequence[str], *, label: str, links: Mapping[str, str] | None = None) -> str:
    """Draw the map.

    Each point has one class for each way to colour it: `m-k` its cluster, `m-a`, `m-b` and `m-c` the level of the share of kept
    verdicts, of the evaluator's accuracy and of its confidence, from 0 to 3; `m-an` and so on if it was not measured.

    Args:
        points: the texts, at least one.
        names: name of each cluster.
        label: description of the map, at the start of the `aria-label`.
        links: Optional. Addresses by question id. They are data for the script of the page and not links: the picture is one
            image to a screen reader, and hundreds of links would be as many stops of the Tab key. Default: none.
    """
    found = links or {}
    body = "".join(_point(p, names[p.cluster], found.get(p.id, "")) for p in ordered_points(points))
    labels = "".join(_label(x, y, number) for number, (x, y) in enumerate(_label_places(points, len(names)), start=1))
    counts = (sum(point.cluster == cluster for point in points) for cluster in range(len(names)))
    clusters = "; ".join(
        f"cluster {n}: {name}, {count} texts" for n, (name, count) in enumerate(zip(names, counts, strict=True), 1)
    )
    return (
        f'<svg class="chart map-picture" role="img" aria-label="{escape(f"{label}. {clusters}")}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{body}{labels}</svg>'
    )


def _place(point: MapPoint) -> tuple[float, float]:
    # One scale for both axes, as the distances have no direction; the picture is wider than high.
    side = HEIGHT - 2 * MARGIN
    stretch = (WIDTH - 2 * MARGIN) / side
    return MARGIN + side * stretch * point.x, MARGIN + side * (1 - point.y)


def _point(point: MapPoint, name: str, link: str) -> str:
    x, y = (round(value, 1) for value in _place(point))
    levels = (("a", point.kept, LEVELS), ("b", point.accuracy, LEVELS), ("c", point.confidence, CONFIDENCE_LEVELS))
    shown = (f"m-{letter}{_level(value, limits)}" for letter, value, limits in levels)
    classes = " ".join((f"m-k{point.cluster % COLOURS}", *shown))
    data = f' data-href="{escape(link)}"' if link else ""
    title = f"<title>{escape(_description(point, name))}</title>"
    if point.kind == "seed":
        return f'<path class="m-point m-seed {classes}" d="M{x} {y - 4:.1f}l4 4l-4 4l-4 -4z"{data}>{title}</path>'
    if point.kind == "dropped":
        return f'<path class="m-point m-drop {classes}" d="M{x - 2:.1f} {y - 2:.1f}l4 4m0 -4l-4 4"{data}>{title}</path>'
    return f'<circle class="m-point {classes}" cx="{x}" cy="{y}" r="2.2"{data}>{title}</circle>'


def _level(value: float | None, limits: Sequence[float]) -> str:
    return "n" if value is None else str(sum(value >= limit for limit in limits))


def _description(point: MapPoint, name: str) -> str:
    shares = (
        ("verdicts kept", point.kept),
        ("evaluator right", point.accuracy),
        ("evaluator's confidence", point.confidence),
    )
    results = [f"{what} {share:.0%}" for what, share in shares if share is not None]
    kind = _KINDS[point.kind] + (f" ({point.reason.replace('_', ' ')})" if point.reason else "")
    return f"{point.text}\n{'; '.join([kind, f'cluster {point.cluster + 1}: {name}', *results])}"


def _label_places(points: Sequence[MapPoint], count: int) -> list[tuple[float, float]]:
    """Return the middle of each cluster, moved down where two labels would overlap."""
    found: list[tuple[float, float]] = []
    for cluster in range(count):
        own = [_place(point) for point in points if point.cluster == cluster] or [(WIDTH / 2, HEIGHT / 2)]
        x, y = (sorted(values)[len(own) // 2] for values in zip(*own, strict=True))
        while any(abs(x - other_x) < 18 and abs(y - other_y) < 14 for other_x, other_y in found):
            y += 14
        found.append((x, y))
    return found


def _label(x: float, y: float, number: int) -> str:
    return f'<text class="m-label middle" x="{x:.1f}" y="{y + 4:.1f}">{number}</text>'
