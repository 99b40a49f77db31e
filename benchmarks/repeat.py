"""Check reproducibility: run the same command twice, and once more with three kill -9 at random moments.

Everything in report.json is compared except measurements of the process: `time` and `memory.peak_bytes`.

python benchmarks/repeat.py [--folder runs/bench-repeat] [--first runs/bench-loop/seed-0]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import selfeval, write


def comparable(folder: Path) -> dict[str, Any]:
    """Return report.json without measurements of the process."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report.pop("time")
    report["memory"].pop("peak_bytes")
    return report


def killed_run(output: Path, seconds: float, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kill the run at random moments, then let it finish; return the time and stage of each kill."""
    rng, struck = random.Random(seed), []
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-m", "selfeval", "run", "--output", str(output), "--quiet"])
        time.sleep(rng.uniform(0.1, 0.9) * seconds / kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        manifests = sorted(p.parent.name for p in output.glob("*/manifest.json"))
        struck.append({"finished_stages": manifests, "return_code": process.returncode})
    selfeval("run", "--output", str(output), "--quiet")
    return struck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-repeat"))
    parser.add_argument("--first", type=Path, help="a finished run of the same command, instead of a new one")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the run is killed")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    first, second, third = (options.folder / name for name in ("first", "second", "killed"))
    if options.first:
        first, seconds = options.first, float(json.loads((options.first / "report.json").read_text())["time"]["total"])
    else:
        seconds = selfeval("run", "--output", str(first), "--quiet")
    selfeval("run", "--output", str(second), "--quiet")
    struck = killed_run(third, seconds, 3, options.seed)
    same = {"twice": _same(first, second), "killed_three_times": _same(first, third)}
    print(json.dumps({"same_report": same, "kills": struck}, indent=2))
    write("repeat", "python benchmarks/repeat.py", {"same_report": same, "kills": struck, "seconds": round(seconds, 1)})


def _same(one: Path, other: Path) -> bool:
    a, b = comparable(one), comparable(other)
    a["name"] = b["name"] = ""
    a["config"]["name"] = b["config"]["name"] = ""
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            print(f"{key} differs between {one} and {other}")
    return a == b


if __name__ == "__main__":
    main()
