from __future__ import annotations

from typing import Any

from sample_report import parsed, sample_report

from selfeval.report.memory import memory_rows
from selfeval.report.schema import Report
from selfeval.report.sections import all_sections
from selfeval.report.summary import summary_rows


def event(stage: str, phase: str, kind: str, before: int, after: int, times: int = 1) -> dict[str, Any]:
    unit = "rows" if phase == "rollout" else "tokens"
    limits = {"from": before, "to": after, "unit": unit}
    return {"stage": stage, "phase": phase, "kind": kind, **limits, "free_bytes": 10**9, "times": times}


EVENTS = [
    event("replies", "rollout", "out_of_memory", 256, 128),
    event("policy", "update", "out_of_memory", 16384, 8192, 2),
    event("policy", "update", "over_budget", 8192, 4096),
    event("policy", "update", "grown", 4096, 8192, 3),
    event("policy", "score", "little_free", 16384, 2048),
]
ROWS = [
    ("memory, replies: rollout", "256 → 128 rows at a time; out of memory once"),
    (
        "memory, policy: update",
        "16384 → 4096 tokens at a time; out of memory 2 times, over the memory budget once, grown back 3 times",
    ),
    ("memory, policy: score", "16384 → 2048 tokens at a time; less memory free than before once"),
]


def with_events(events: list[dict[str, Any]]) -> Report:
    report = sample_report()
    report["memory"]["events"] = events
    return parsed(report)


def test_a_row_for_each_stage_and_phase() -> None:
    assert memory_rows(with_events(EVENTS).memory) == ROWS
    assert memory_rows(with_events([]).memory) == []


def test_table_and_page_say_it_and_only_when_something_happened() -> None:
    report, quiet = with_events(EVENTS), with_events([])
    assert [row for row in summary_rows(report) if row not in summary_rows(quiet)] == ROWS
    assert all_sections(report, {})["cost"]["memory"][-3:] == ROWS
    assert len(all_sections(quiet, {})["cost"]["memory"]) == len(all_sections(report, {})["cost"]["memory"]) - 3
