"""Report rows about batch limits that were reduced because memory was short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from selfeval.report.schema import Memory, MemoryEvent

__all__ = ["event_rows", "memory_rows"]

_KINDS = {
    "out_of_memory": "out of memory",
    "over_budget": "over the memory budget",
    "little_free": "less memory free than before",
    "grown": "grown back",
}


def memory_rows(memory: Memory) -> list[tuple[str, str]]:
    """Return a row for each stage and phase whose limit changed, with the change and its cause; most runs have none."""
    return event_rows(memory.events)


def event_rows(events: Sequence[MemoryEvent]) -> list[tuple[str, str]]:
    """Return the rows of `memory_rows` for events that are in no report yet."""
    places: dict[tuple[str, str, str], list[MemoryEvent]] = {}
    for event in events:
        places.setdefault((event.stage, event.phase, event.unit), []).append(event)
    return [
        (f"memory, {stage}: {phase}", f"{_limits(events)} {unit} at a time; {_reasons(events)}")
        for (stage, phase, unit), events in places.items()
    ]


def _limits(events: Sequence[MemoryEvent]) -> str:
    """Format the highest and the lowest limit."""
    limits = [limit for event in events for limit in (event.before, event.after)]
    return f"{max(limits)} → {min(limits)}"


def _reasons(events: Sequence[MemoryEvent]) -> str:
    times: Counter[str] = Counter()
    for event in events:
        times[_KINDS.get(event.kind, event.kind)] += event.times
    return ", ".join(f"{kind} {'once' if count == 1 else f'{count} times'}" for kind, count in times.items())
