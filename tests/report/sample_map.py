"""A map of the domain in the shape that a real run writes, for the tests of the page."""

from __future__ import annotations

import random
from typing import Any

from sample_report import Figure, fig

from selfeval.report.map_points import MapPoint

WORDS = (
    ("apples", "pears", "basket"),
    ("bus", "minutes", "station"),
    ("苹果", "火车"),
    ("marbles", "gives", "friend"),
    ("pages", "reads", "book"),
)
SIZES = (60, 45, 30, 24, 8)
MIDDLES = ((0.2, 0.7), (0.75, 0.75), (0.5, 0.2), (0.52, 0.24), (0.9, 0.3))
"""The third and the fourth cluster are so close that their labels have to make room."""


def sample_map() -> dict[str, Any]:
    """The part of the report: the evaluator is weak in the second cluster, and the last one is thin."""
    return {
        "embedder": "backbone-1a2b3c4d-layer3-mean-99999999",
        "projection": "t-SNE",
        "points": sum(SIZES) + 10,
        "texts": 5120,
        "silhouette": 0.231,
        "labels": "gold",
        "clusters": [_cluster(number) for number in range(len(SIZES))],
    }


def _cluster(number: int) -> dict[str, Any]:
    size, first = SIZES[number], WORDS[number][0]
    accuracy: Figure = fig(0.71, 0.58, 0.82, 22) if number == 1 else fig(0.96, 0.9, 0.99, size // 2)
    return {
        "words": list(WORDS[number]),
        "example": f"How many {first} are there?",
        "questions": size,
        "seeds": 2 if number == 4 else 1,
        "dropped": 0 if number == 4 else 1,
        "kept": fig(0.9 - number / 10, 0.8 - number / 10, 0.95 - number / 10, size),
        "accuracy": accuracy,
        "confidence": fig(0.91, 0.88, 0.94, size // 2),
    }


def sample_points() -> list[MapPoint]:
    """The points of these clusters, by a fixed seed."""
    rng = random.Random(0)
    return [point for number in range(len(SIZES)) for point in _points(number, rng)]


def _points(number: int, rng: random.Random) -> list[MapPoint]:
    kinds = [*(("train", "test")[place % 2] for place in range(SIZES[number])), "seed", "dropped"]
    return [_point(number, place, kind, rng) for place, kind in enumerate(kinds)]


def _point(number: int, place: int, kind: str, rng: random.Random) -> MapPoint:
    x, y = (min(1.0, max(0.0, rng.gauss(middle, 0.06))) for middle in MIDDLES[number])
    is_test, is_asked = kind == "test", kind in ("train", "test")
    return MapPoint.model_validate(
        {
            "kind": kind,
            "id": f"q{number}{place:03d}" if is_asked else "",
            "text": f"{kind} {place} of cluster {number}: how many <{WORDS[number][0]}> are there?",
            "reason": "near_duplicate" if kind == "dropped" else "",
            "x": x,
            "y": y,
            "cluster": number,
            "kept": rng.choice((0.0, 0.5, 1.0)) if is_asked else None,
            "accuracy": float(rng.random() < 0.9) if is_test else None,
            "confidence": 0.5 + rng.random() / 2 if is_test else None,
        }
    )
