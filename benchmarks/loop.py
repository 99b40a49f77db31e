"""The whole loop on several seeds, by the real command, with the targets that it is held to.

python benchmarks/loop.py [--seeds 0 1 2 3 4] [--folder runs/bench-loop]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from common import selfeval, write

_FIGURES = {
    "evaluator_gold": ("evaluator", "accuracy_gold"),
    "evaluator_judge": ("evaluator", "accuracy_judge"),
    "baseline_judge": ("evaluator", "baselines", "judge"),
    "baseline_longer_wins": ("evaluator", "baselines", "longer_wins"),
    "baseline_first_wins": ("evaluator", "baselines", "first_wins"),
    "baseline_mean_logprob": ("evaluator", "baselines", "mean_logprob"),
    "evaluator_less_judge": ("evaluator", "comparisons", "judge", "difference"),
    "evaluator_less_mean_logprob": ("evaluator", "comparisons", "mean_logprob", "difference"),
    "judge_seconds_over_evaluator": ("time", "per_verdict", "judge_over_evaluator"),
    "judge_seconds_over_scoring": ("time", "per_verdict", "judge_over_scoring"),
    "kept_share": ("verdicts", "kept_share"),
    "kept_labels_right": ("verdicts", "label_accuracy_gold"),
    "swap_consistency": ("verdicts", "swap_consistency"),
    "gold_before": ("policy", "gold_before"),
    "gold_after": ("policy", "gold_after"),
    "gold_gain": ("policy", "gold_gain"),
    "win_rate": ("policy", "win_rate"),
    "win_rate_decisive": ("policy", "win_rate_decisive"),
    "length_controlled": ("policy", "length_controlled"),
    "kl": ("policy", "kl"),
    "length_ratio": ("policy", "length_ratio"),
}


def _pick(report: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        report = report[key]
    return report


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """One fresh run with this seed."""
    output = folder / f"seed-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    seconds = selfeval("run", "--output", str(output), "--set", f"seed={seed}", "--quiet")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    figures = {name: _pick(report, path) for name, path in _FIGURES.items()}
    memory = {"peak_gib": round(report["memory"]["peak_bytes"] / 2**30, 3), "weight_copies": report["memory"]["weight_copies"]}
    return {"seed": seed, "seconds": round(seconds, 1), **memory, "watchdogs": len(report["policy"]["watchdogs"]), **figures}


def targets(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Which of the project's targets every seed meets."""
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
        for name in ("seconds", "peak_gib", *_FIGURES)
    }
    met = targets(rows)
    for name, value in {**medians, **met}.items():
        print(f"{name:44} {value}")
    write("loop", "python benchmarks/loop.py", {"medians": medians, "targets": met, "runs": rows})


if __name__ == "__main__":
    main()
