"""report: puts the figures, counts, times and the resolved configuration into report.json, and draws the page."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from selfeval import __version__
from selfeval.backbone.meters import peak_resident_bytes
from selfeval.records import Pair, Question, Reply, Split
from selfeval.report.page import draw_page
from selfeval.stages.context import Context
from selfeval.store import read_json, write_json

__all__ = ["SCHEMA", "build_report", "run", "versions"]

SCHEMA = 1
_DROPPING = ("questions", "verdicts")
_EXAMPLES_PER_REASON = 2
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")


def _dropped(context: Context) -> dict[str, Any]:
    result: dict[str, Any] = {}
    examples: list[dict[str, str]] = []
    for stage in _DROPPING:
        drops = context.store.read_dropped(stage)
        result[stage] = dict(sorted(Counter(d.reason for d in drops).items()))
        shown: Counter[str] = Counter()
        for drop in drops:
            shown[drop.reason] += 1
            if shown[drop.reason] <= _EXAMPLES_PER_REASON:
                examples.append({"stage": stage, "reason": drop.reason, "text": drop.text})
    return {**result, "examples": examples}


def _data(context: Context) -> dict[str, int]:
    questions, pairs = context.store.read("questions", Question), context.store.read("pairs", Pair)
    return {
        "seeds": len(context.seeds),
        "questions": sum(q.split == Split.TRAIN for q in questions),
        "questions_test": sum(q.split == Split.TEST for q in questions),
        "replies": len(context.store.read("replies", Reply)),
        "pairs_train": sum(p.split == Split.TRAIN for p in pairs),
        "pairs_held_out": sum(p.split == Split.TEST for p in pairs),
    }


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the libraries that the figures depend on."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"selfeval": __version__, "python": platform.python_version(), **libraries}


def build_report(context: Context) -> dict[str, Any]:
    """The contents of report.json, schema 1."""
    figures = read_json(context.store.folder("evaluation") / "figures.json")
    stages = context.store.run.get("stages", {})
    seconds = {name: row.get("seconds", 0.0) for name, row in stages.items() if name != "report"}
    config = context.config.model_dump(mode="json")
    peak = max([peak_resident_bytes(), *(row.get("peak_bytes", 0) for row in stages.values())])
    events = [{"stage": name, **event} for name, row in stages.items() for event in row.get("memory_events", [])]
    return {
        "schema": SCHEMA,
        "name": context.config.name,
        "seed": context.config.seed,
        "model": figures["model"],
        "data": _data(context),
        "evaluator": figures["evaluator"],
        "verdicts": figures["verdicts"],
        "policy": figures["policy"],
        "dropped": _dropped(context),
        "samples": figures["samples"],
        "time": {**seconds, "total": round(sum(seconds.values()), 2)},
        "memory": {**figures["memory"], "peak_bytes": peak, "events": events},
        "versions": versions(),
        "config": config,
    }


def run(context: Context) -> dict[str, Any]:
    """Writes report.json and index.html."""
    write_json(context.store.root / "report.json", build_report(context))
    draw_page(context.store.root)
    return {}
