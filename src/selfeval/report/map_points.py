"""The points of the map of the domain: evaluation/map.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import PlainSerializer

from selfeval.report.reading import parse_part
from selfeval.report.schema import Part
from selfeval.store import fingerprint, open_file

__all__ = ["LONGEST_TEXT", "MAP_FILE", "MapKind", "MapPoint", "MapPoints", "cut_text", "points_fingerprint", "read_map_points"]

MAP_FILE = "evaluation/map.json"
LONGEST_TEXT = 160
"""Characters of a text on the map."""

MapKind = Literal["seed", "train", "test", "dropped"]
_Rounded = Annotated[float, PlainSerializer(lambda value: round(value, 4))]


class MapPoint(Part):
    """A text on the map."""

    kind: MapKind
    """A seed, a question of one of the splits, or a dropped question."""
    id: str
    """Id of the question; empty for a seed or a dropped question."""
    text: str
    """The text, cut after 160 characters."""
    reason: str
    """Why it was dropped; empty for the others."""
    x: _Rounded
    """From 0 (left) to 1."""
    y: _Rounded
    """From 0 (bottom) to 1."""
    cluster: int
    """Place of its cluster in the report's `domain_map.clusters`."""
    kept: _Rounded | None
    """Share of its judged pairs that were kept. `null` without a judged pair."""
    accuracy: _Rounded | None
    """Share of its test pairs on which the evaluator prefers the better reply. `null` without a labelled pair."""
    confidence: _Rounded | None
    """Mean confidence of the evaluator on its test pairs. `null` without a test pair."""


class MapPoints(Part):
    """evaluation/map.json."""

    points: tuple[MapPoint, ...]
    """The texts."""


def cut_text(text: str) -> str:
    """Return a text as the map shows it: on one line, at most `LONGEST_TEXT` characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_TEXT else f"{line[: LONGEST_TEXT - 1]}…"


def points_fingerprint(points: Sequence[MapPoint]) -> str:
    """Return the content hash of the points as they are written to the file, which the report of the same evaluation has."""
    return fingerprint([point.as_json() for point in points])


def read_map_points(run_folder: Path) -> tuple[MapPoint, ...]:
    """Read the points of a run's map; none if the run has no map.

    Raises:
        InputError: the file is damaged; the message names the first wrong field.
    """
    path = run_folder / MAP_FILE
    try:
        with open_file(path) as file:
            data = file.read()
    except FileNotFoundError:
        return ()
    return parse_part(MapPoints, data, str(path)).points
