"""What the report says of limits that shrank because memory was short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from selfeval.errors import InputError
from selfeval.report.figures import finite, section

__all__ = ["memory_rows"]

_KINDS = {
    "out_of_memory": "out of memory",
    "over_budget": "over the memory budget",
    "little_free": "less memory free than before",
    "grown": "grown back",
}


def memory_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for each stage and phase whose limit changed: where, and what happened; none in most runs.

    Raises:
        InputError: `memory.events` is not a list of objects.
    """
    events = section(report, "memory").get("events", [])
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise InputError("report.json: 'memory.events' should be a list of objects")
    places: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for event in events:
        place = (str(event.get("stage")), str(event.get("phase")), str(event.get("unit")))
        places.setdefault(place, []).append(event)
    return [
        (f"memory, {stage}: {phase}", f"{_limits(happened)} {unit} at once; {_reasons(happened)}")
        for (stage, phase, unit), happened in places.items()
    ]


def _limits(events: Sequence[dict[str, Any]]) -> str:
    """The highest limit and the lowest."""
    limits = [finite(event.get(key)) or 0 for event in events for key in ("from", "to")]
    return f"{max(limits):.0f} → {min(limits):.0f}"


def _reasons(events: Sequence[dict[str, Any]]) -> str:
    times: Counter[str] = Counter()
    for event in events:
        kind = str(event.get("kind"))
        times[_KINDS.get(kind, kind)] += int(finite(event.get("times")) or 1)
    return ", ".join(f"{kind} {'once' if count == 1 else f'{count} times'}" for kind, count in times.items())
