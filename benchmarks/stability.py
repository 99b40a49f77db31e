"""Measure the stability of policy learning: many seeds, three learning rates that span a factor of ten, ablations of its parts.

Every training is benchmarks/learning.py on the embedded model with the evaluator of a run of benchmarks/loop.py. Each writes
its result to a separate file; an interrupted command resumes where it stopped.

python benchmarks/stability.py [--runs runs/bench-loop/seed-*] [--folder runs/stability] [--workers 1]
python benchmarks/stability.py --ablations
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write
from learning import TEST_QUESTIONS, train_all

SEEDS = 17
RATES = ("6e-4", "2e-3", "6e-3")
TARGET = 0.8
"""Nats per reply, below the 1.1 to 1.3 at which this policy settles by itself: a target above that would have no effect."""
SHAPE = ("iterations=24", "questions_per_iteration=32", "replies_per_question=4")
CONTROL = (f"kl_target={TARGET}", "kl_coefficient=0.1")
WINDOWS = (3, 6)
"""Iterations in a mean of gold replies: 128 replies alone are known to plus or minus 5 points, 3 x 128 to 3, 6 x 128 to 2."""

ABLATIONS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "rewards not whitened": ("whiten_rewards=false",),
    "rewards not clipped": ("reward_clip=none",),
    "advantages not whitened": ("ppo.whiten_advantages=false",),
    "advantages clipped to 3": ("ppo.advantage_clip=3.0",),
    "KL penalty adaptive": ("kl_control=adaptive",),
    "KL penalty fixed": ("kl_control=fixed",),
    "no value clip": ("ppo.value_clip=none",),
    "no price for unfinished replies": ("unfinished_penalty=0",),
    "length guard at 1.5": ("length_guard=1.5",),
    "no warm-up": ("warmup_iterations=0",),
    "no gradient clipping": ("max_grad_norm=none",),
    "gradients clipped to 0.1": ("max_grad_norm=0.1",),
    "no limit on an iteration's KL": ("ppo.step_kl=none",),
    "entropy floor at 0.7": ("ppo.entropy_floor=0.7",),
    "reference follows by 0.05": ("reference_ema=0.05",),
    "held-out judge looks every 4 iterations": ("judge_every=4",),
}
"""Changes from the defaults, one part at a time."""
ABLATION_SEEDS, ABLATION_RATE = 3, "6e-3"
"""At the largest of the three rates, where each part has an effect."""


def jobs(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the trainings of the main benchmark; every rate of a seed before the next seed, so a part covers all rates."""
    return [
        _job(f"rate-{rate}-seed-{seed}", runs, seed, (*SHAPE, *CONTROL, f"learning_rate={rate}"))
        for seed in range(SEEDS)
        for rate in RATES
    ]


def ablation_jobs(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the trainings of the ablations."""
    shared = (*SHAPE, *CONTROL, f"learning_rate={ABLATION_RATE}")
    return [
        _job(f"{name.replace(' ', '-').replace(chr(39), '')}-seed-{seed}", runs, seed, (*shared, *changes)) | {"part": name}
        for seed in range(ABLATION_SEEDS)
        for name, changes in ABLATIONS.items()
    ]


def _job(name: str, runs: Sequence[Path], seed: int, settings: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "run": str(runs[seed % len(runs)]), "seed": seed, "settings": list(settings)}


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Return the stability figures of one training.

    `collapsed`: gold ends below its start by the test questions, or a watchdog saw entropy, length or KL leave their ranges by
    so much that it rolled back or stopped, or the last replies' entropy or length is out of a fifth to three times the first's.
    `final_over_best_3`: gold of the last three iterations over that of the best three in a row, by the replies sampled for
    training; the best of many noisy means is above the true best, by some two points here, so a policy that holds its
    best would be at about 0.98. `final_over_best_6`: the same with six, where it would be at about 0.99.
    """
    if "failed" in result:
        return {**_name(result), "failed": result["failed"], "collapsed": True, "nan": "NaN" in str(result["failed"])}
    lines, alarms = result["iterations"], result["alarms"]
    first, last, half = lines[0], lines[-3:], lines[len(lines) // 2 :]
    ratios = [statistics.fmean(line[key] for line in last) / first[key] for key in ("entropy", "length")]
    before, after = result["gold_before"]["value"], result["gold_after"]["value"]
    acted = [a for a in alarms if a["action"] != "warn"]
    return {
        **_name(result),
        "seconds": result["seconds"],
        "samples": result["samples"],
        "gold_before": result["gold_before"],
        "gold_after": result["gold_after"],
        "kl_last_half": round(statistics.fmean(line["kl"] for line in half), 4),
        **{f"final_over_best_{w}": round(_final_over_best([line["gold"] for line in lines], w), 4) for w in WINDOWS},
        "nan": any(a["name"] == "not_finite" for a in alarms),
        "rolled_back": sum(a["action"] == "roll_back" for a in acted),
        "warnings": sorted({a["name"] for a in alarms}),
        "collapsed": after <= before or bool(acted) or not all(1 / 5 <= r <= 3 for r in ratios),
    }


def _name(result: dict[str, Any]) -> dict[str, Any]:
    rates = [s.split("=")[1] for s in result["settings"] if s.startswith("learning_rate=")]
    return {"run": Path(result["run"]).name, "seed": result["seed"], "learning_rate": rates[-1]}


def _final_over_best(gold: Sequence[float], window: int) -> float:
    means = [statistics.fmean(gold[i : i + window]) for i in range(len(gold) - window + 1)]
    return means[-1] / max(means)


def targets(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how many runs meet each of the project's targets, and whether all do."""
    whole = [row for row in rows if "failed" not in row]
    kls = [row["kl_last_half"] / TARGET for row in whole]
    met = {
        "gold ends above its start": [row["gold_after"]["value"] > row["gold_before"]["value"] for row in whole],
        "no NaN": [not row["nan"] for row in rows],
        "no collapse": [not row["collapsed"] for row in rows],
        "KL within 10% of its target over the last half": [abs(kl - 1) <= 0.1 for kl in kls],
        **{
            f"final gold >= 98% of the best, {w} iterations": [r[f"final_over_best_{w}"] >= 0.98 for r in whole]
            for w in WINDOWS
        },
    }
    return {name: {"runs": len(rows), "met": sum(found), "all": sum(found) == len(rows)} for name, found in met.items()}


def by_rate(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return medians and extremes over the seeds of each learning rate."""
    found = {}
    for rate in RATES:
        whole = [row for row in rows if row["learning_rate"] == rate and "failed" not in row]
        if whole:
            found[rate] = {"runs": len(whole), **_spread(whole)}
    return found


def _spread(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    columns = {
        "gold_before": [row["gold_before"]["value"] for row in rows],
        "gold_after": [row["gold_after"]["value"] for row in rows],
        "kl_last_half": [row["kl_last_half"] for row in rows],
        **{f"final_over_best_{w}": [row[f"final_over_best_{w}"] for row in rows] for w in WINDOWS},
        "seconds": [row["seconds"] for row in rows],
    }
    found: dict[str, float] = {}
    for name, values in columns.items():
        found |= {name: round(statistics.median(values), 4), f"{name}_min": min(values), f"{name}_max": max(values)}
    return found


def _finished(planned: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return the existing results, in the order of the jobs."""
    paths = [(job, folder / f"{job['name']}.json") for job in planned]
    return [{**job, **json.loads(path.read_text(encoding="utf-8"))} for job, path in paths if path.is_file()]


def summarise(planned: Sequence[dict[str, Any]], folder: Path, command: str) -> None:
    """Write results/stability.json from the finished trainings."""
    rows = [judge(result) for result in _finished(planned, folder)]
    met = targets(rows)
    for name, value in met.items():
        print(f"{name:50} {value['met']} of {value['runs']}")
    shared = {"target": TARGET, "settings": [*SHAPE, *CONTROL], "test_questions": TEST_QUESTIONS, "windows": WINDOWS}
    write("stability", command, {**shared, "planned": len(planned), "targets": met, "by_rate": by_rate(rows), "runs": rows})


def summarise_ablations(planned: Sequence[dict[str, Any]], folder: Path, command: str) -> None:
    """Write results/ablations.json from the finished trainings."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in ABLATIONS}
    for result in _finished(planned, folder):
        parts[result["part"]].append(judge(result))
    found = {}
    for name, rows in parts.items():
        whole = [row for row in rows if "failed" not in row]
        figures = {**_spread(whole), "rolled_back": sum(row["rolled_back"] for row in whole)} if whole else {}
        found[name] = {"settings": list(ABLATIONS[name]), "runs": len(rows), "failed": len(rows) - len(whole), **figures}
    shared = {"target": TARGET, "settings": [*SHAPE, *CONTROL, f"learning_rate={ABLATION_RATE}"]}
    write("ablations", command, {**shared, "planned": len(planned), "parts": found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path(f"runs/bench-loop/seed-{s}") for s in range(5)])
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"), help="where each training's result goes")
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side, a core each")
    parser.add_argument("--ablations", action="store_true", help="the parts of the stability kit, one at a time")
    parser.add_argument("--summary", action="store_true", help="train nothing; sum up what is finished")
    options = parser.parse_args()
    planned = ablation_jobs(options.runs) if options.ablations else jobs(options.runs)
    command = "python benchmarks/stability.py" + (" --ablations" if options.ablations else "")
    if not options.summary:
        train_all(planned, options.folder, options.workers)
    (summarise_ablations if options.ablations else summarise)(planned, options.folder, command)


if __name__ == "__main__":
    main()
