"""Compare all learners at equal samples on the embedded model: gold before and after, seconds, peak memory; five seeds.

python benchmarks/learners.py [--runs runs/bench-loop/seed-0 ...] [--iterations 16] [--folder runs/bench-learners] [--workers 2]

The evaluators, one per seed, are those of benchmarks/loop.py. Trainings with a result in the folder are skipped.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from common import write
from learning import train_all

from selfeval.config import LEARNERS
from selfeval.quality.statistics import mean_figure


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize one learner over its seeds; intervals are over seeds, not over questions."""
    after = [row["gold_after"]["value"] for row in rows]
    gains = [row["gold_after"]["value"] - row["gold_before"]["value"] for row in rows]
    last = [statistics.fmean(line["kl"] for line in row["iterations"][-4:]) for row in rows]
    found = {
        "seeds": len(rows),
        "samples": rows[0]["samples"],
        "gold_before": mean_figure([row["gold_before"]["value"] for row in rows], bounds=None).as_json(),
        "gold_after": mean_figure(after, bounds=None).as_json(),
        "gain": mean_figure(gains, bounds=None).as_json(),
        "kl": round(statistics.fmean(last), 3),
        "seconds": round(statistics.median(row["seconds"] for row in rows), 1),
        "peak_mib": round(statistics.median(row["peak_bytes"] for row in rows) / 2**20),
        "alarms": sorted({alarm["name"] for row in rows for alarm in row["alarms"]}),
    }
    steps = [(line["step_kl"], line["step_kl_bound"]) for row in rows for line in row["iterations"] if "step_kl" in line]
    if steps:
        found |= {
            "steps": len(steps),
            "largest_step_kl": round(max(kl for kl, _ in steps), 6),
            "largest_share_of_bound": round(max(kl / bound for kl, bound in steps), 4),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", default=[f"runs/bench-loop/seed-{seed}" for seed in range(5)])
    parser.add_argument("--learners", nargs="+", default=sorted(LEARNERS))
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-learners"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        {
            "name": f"{learner}-{number}",
            "run": run,
            "seed": number,
            "settings": [f"learner={learner}", f"iterations={options.iterations}"],
        }
        for number, run in enumerate(options.runs)
        for learner in options.learners
    ]
    results = train_all(jobs, options.folder, options.workers)
    by_learner: dict[str, list[dict[str, Any]]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_learner.setdefault(str(job["name"]).rsplit("-", 1)[0], []).append(result)
    failed = {name: [row["failed"] for row in rows if "failed" in row] for name, rows in by_learner.items()}
    whole = {name: [row for row in rows if "failed" not in row] for name, rows in by_learner.items()}
    figures = {name: summary(rows) for name, rows in whole.items() if rows}
    write("learners", "python benchmarks/learners.py", {"learners": figures, "failed": {k: v for k, v in failed.items() if v}})


if __name__ == "__main__":
    main()
