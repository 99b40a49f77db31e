"""Run the whole loop with and without the parts of the domain data: evaluator, policy and CPU time.

python benchmarks/domain_loop.py [--part steering cost] [--seeds 0 1 2] [--folder runs/bench-domain]

- `steering`: `questions.coverage` off (uniform) and on (steered), with 400 training and 400 test questions in shards of 100:
  the evaluator's accuracy and the policy's share of right replies, by gold, for each seed.
- `cost`: CPU seconds of `selfeval run` with its defaults, and without the parts of the domain data that are switched on by
  default (the map of the report, the search for loops in replies), at the default size.

One thread. Each run is written when it is finished, and a later call continues.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

from common import RESULTS, selfeval, write

from selfeval.quality.statistics import Figure
from selfeval.report.reading import read_report
from selfeval.report.schema import Report

NAME, COMMAND = "domain_loop", "python benchmarks/domain_loop.py"
_SIZES = ("questions.train=400", "questions.test=400", "questions.shard=100", "evaluation.questions=400", "policy.gate=off")
"""Small shards, because the examples of a shard are drawn from the questions of earlier ones."""
_WITHOUT = ("evaluation.map_points=0", "replies.loops=keep")


def _figures(report: Report) -> dict[str, Any]:
    evaluator, policy = report.evaluator, report.policy
    figures: dict[str, Figure | None] = {
        "evaluator_gold": evaluator.accuracy_gold,
        "kept_labels_right": report.verdicts.label_accuracy_gold,
        "gold_before": policy.gold_before,
        "gold_after": policy.gold_after,
        "win_rate": policy.win_rate,
    }
    return {name: None if figure is None else figure.as_json() for name, figure in figures.items()}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, seed: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """Run the loop from scratch with this seed and these settings."""
    shutil.rmtree(folder, ignore_errors=True)
    before = _cpu_seconds()
    words = [word for setting in (f"seed={seed}", *settings) for word in ("--set", setting)]
    selfeval("run", "--output", str(folder), "--quiet", *words)
    return {"cpu_seconds": round(_cpu_seconds() - before, 1), **_figures(read_report(folder / "report.json"))}


def plan(parts: list[str], seeds: list[int]) -> list[tuple[str, str, int, tuple[str, ...]]]:
    """Return part, variant, seed and settings of each run."""
    runs: list[tuple[str, str, int, tuple[str, ...]]] = []
    if "cost" in parts:
        runs += [("cost", "defaults", 0, ()), ("cost", "without", 0, _WITHOUT)]
    if "steering" in parts:
        for seed in seeds:
            runs += [("steering", "uniform", seed, _SIZES), ("steering", "steered", seed, (*_SIZES, "questions.coverage=true"))]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=("cost", "steering"), default=["cost", "steering"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-domain"))
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    path = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = {part: found.get(part, {}) for part in ("cost", "steering")}
    for part, variant, seed, settings in plan(options.part, options.seeds):
        rows = parts[part].setdefault(variant, {})
        if str(seed) not in rows:
            rows[str(seed)] = measure(options.folder / f"{part}-{variant}-{seed}", seed, settings)
            print(part, variant, seed, json.dumps(rows[str(seed)]), flush=True)
            write(NAME, COMMAND, parts)


if __name__ == "__main__":
    main()
