"""Writes the tables of docs/metrics.md from the table of metrics in the code.

python docs/generate_metrics.py            writes the page
python docs/generate_metrics.py --check    exits with 1 when the page is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

from generating import main

from selfeval.report.metrics import METRICS, Metric

PAGE = Path(__file__).parent / "metrics.md"


def table(metrics: tuple[Metric, ...]) -> str:
    rows = [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.typical} |" for m in metrics]
    return "\n".join(["| key | unit | meaning | typical |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main(PAGE, {stage: table(metrics) for stage, metrics in METRICS.items()}, "src/selfeval/report/metrics.py"))
