"""Run the whole loop on several seeds with the `selfeval` command, and check the project's targets.

python benchmarks/loop.py [--seeds 0 1 2 3 4] [--folder runs/bench-loop]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

from common import selfeval, write

from selfeval.quality.statistics import Figure
from selfeval.report.reading import read_report
from selfeval.report.schema import Report


def _figures(report: Report) -> dict[str, Any]:
    """Return the figures of a run by their names in the results."""
    evaluator, verdicts, policy, times = report.evaluator, report.verdicts, report.policy, report.time.per_verdict
    figures: dict[str, Figure | None] = {
        "evaluator_gold": evaluator.accuracy_gold,
        "evaluator_judge": evaluator.accuracy_judge,
        "baseline_judge": evaluator.baselines.judge,
        "baseline_longer_wins": evaluator.baselines.longer_wins,
        "baseline_first_wins": evaluator.baselines.first_wins,
        "baseline_mean_logprob": evaluator.baselines.mean_logprob,
        "evaluator_less_judge": judge.difference if (judge := evaluator.comparisons.judge) else None,
        "evaluator_less_mean_logprob": evaluator.comparisons.mean_logprob.difference,
        "judge_seconds_over_evaluator": times.judge_over_evaluator if times else None,
        "judge_seconds_over_scoring": times.judge_over_scoring if times else None,
        "kept_share": verdicts.kept_share,
        "kept_labels_right": verdicts.label_accuracy_gold,
        "swap_consistency": verdicts.swap_consistency,
        "gold_before": policy.gold_before,
        "gold_after": policy.gold_after,
        "gold_gain": policy.gold_gain,
        "win_rate": policy.win_rate,
        "win_rate_decisive": policy.win_rate_decisive,
        "length_controlled": policy.length_controlled,
        "kl": policy.kl,
        "length_ratio": policy.length_ratio,
    }
    return {name: None if figure is None else figure.as_json() for name, figure in figures.items()}


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """Run the loop from scratch with this seed."""
    output = folder / f"seed-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    seconds = selfeval("run", "--output", str(output), "--set", f"seed={seed}", "--quiet")
    report = read_report(output / "report.json")
    memory = {"peak_gib": round(report.memory.peak_bytes / 2**30, 3), "weight_copies": report.memory.weight_copies}
    alarms = {"watchdogs": len(report.policy.watchdogs)}
    return {"seed": seed, "seconds": round(seconds, 1), **memory, **alarms, **_figures(report)}


def targets(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Return which of the project's targets are met by every seed."""
    return {
        "seconds <= 300": all(r["seconds"] <= 300 for r in rows),
        "evaluator_gold >= 0.96": all(r["evaluator_gold"]["value"] >= 0.96 for r in rows),
        "evaluator_gold ci_low >= 0.95": all(r["evaluator_gold"]["ci_low"] >= 0.95 for r in rows),
        "evaluator_gold n >= 1500": all(r["evaluator_gold"]["n"] >= 1500 for r in rows),
        "kept_labels_right >= 0.98": all(r["kept_labels_right"]["value"] >= 0.98 for r in rows),
        "gold_before <= 0.60": all(r["gold_before"]["value"] <= 0.60 for r in rows),
        "gold_after >= 0.90": all(r["gold_after"]["value"] >= 0.90 for r in rows),
        "win_rate >= 0.80 (ties count half)": all(r["win_rate"]["value"] >= 0.80 for r in rows),
        "win_rate_decisive >= 0.80 (ties dropped)": all(r["win_rate_decisive"]["value"] >= 0.80 for r in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-loop"))
    options = parser.parse_args()
    rows = [measure(seed, options.folder) for seed in options.seeds]
    medians = {
        name: round(statistics.median(r[name]["value"] if isinstance(r[name], dict) else r[name] for r in rows), 4)
        for name in ("seconds", "peak_gib", *(name for name, value in rows[0].items() if isinstance(value, dict)))
    }
    met = targets(rows)
    for name, value in {**medians, **met}.items():
        print(f"{name:44} {value}")
    write("loop", "python benchmarks/loop.py", {"medians": medians, "targets": met, "runs": rows})


if __name__ == "__main__":
    main()
