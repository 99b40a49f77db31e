"""report: puts the figures, counts, times and the resolved configuration into report.json, and draws the page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from selfeval import __version__
from selfeval.backbone.meters import peak_resident_bytes
from selfeval.judging.templates import template_texts
from selfeval.records import Pair, Question, Reply, Split
from selfeval.report.page import draw_page
from selfeval.runs.reader import pairs_of
from selfeval.runs.templates import TEMPLATES
from selfeval.stages.context import Context
from selfeval.store import RunStore, read_json, write_json

__all__ = ["SCHEMA", "build_report", "run", "versions"]

SCHEMA = 1
_DROPPING = ("questions", "verdicts")
_EXAMPLES_PER_REASON = 2
_POLICY_BY_ROUND = ("win_rate", "win", "tie", "loss", "gold_before", "gold_after", "gold_gain", "kl", "comparisons")
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
    questions = context.store.read("questions", Question)
    return {
        "seeds": len(context.seeds),
        "questions": sum(q.split == Split.TRAIN for q in questions),
        "questions_test": sum(q.split == Split.TEST for q in questions),
        "replies": len(context.store.read("replies", Reply)),
        "pairs_train": len(context.store.read(pairs_of(Split.TRAIN), Pair)),
        "pairs_held_out": len(context.store.read(pairs_of(Split.TEST), Pair)),
    }


def _rounds(stores: Sequence[RunStore]) -> list[dict[str, Any]]:
    """One row per round: what its evaluator is worth, and its policy against the one before."""
    rows = []
    for number, store in enumerate(stores, start=1):
        figures = read_json(store.folder("evaluation") / "figures.json")
        evaluator, policy = figures["evaluator"], figures["policy"]
        first = evaluator["first_pairs"]
        rows.append(
            {
                "round": number,
                "folder": str(store.root.relative_to(stores[0].root)),
                "evaluator": {
                    "accuracy_gold": evaluator["accuracy_gold"],
                    "accuracy_judge": evaluator["accuracy_judge"],
                    "accuracy_gold_first_pairs": first["accuracy_gold"],
                    "accuracy_judge_first_pairs": first["accuracy_judge"],
                    "gain": first["gain"],
                    "comparison": first.get("comparison"),
                    "pairs_trained": evaluator["pairs_trained"],
                },
                # The evidence of a finished stage may be from a version that made no comparisons.
                "policy": {name: policy.get(name) for name in _POLICY_BY_ROUND},
            }
        )
    return rows


def _prompts(context: Context) -> dict[str, str]:
    """The prompt templates that the run used, by file name; the folder of round 1 holds them for all rounds."""
    folder = context.first.root / TEMPLATES
    return template_texts(folder) if folder.is_dir() else {}


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
    rounds = {"rounds": _rounds([context.store, *context.later])} if context.round == 1 < context.config.rounds else {}
    return {
        "schema": SCHEMA,
        "name": context.name,
        "seed": context.config.seed,
        "model": figures["model"],
        "data": _data(context),
        "evaluator": figures["evaluator"],
        "verdicts": figures["verdicts"],
        "policy": figures["policy"],
        **rounds,
        "dropped": _dropped(context),
        "samples": figures["samples"],
        "prompts": _prompts(context),
        "time": {
            **seconds,
            "per_verdict": figures.get("seconds_per_verdict"),
            "total": round(sum(seconds.values()), 2),
        },
        "memory": {**figures["memory"], "peak_bytes": peak, "events": events},
        "versions": versions(),
        "config": config,
    }


def run(context: Context) -> dict[str, Any]:
    """Writes report.json and index.html."""
    write_json(context.store.root / "report.json", build_report(context))
    draw_page(context.store.root)
    return {}
