"""CPU time of the first stages on a real instruct model, and the diagnosis of its judge.

python benchmarks/real_model_stages.py [--model FOLDER] [--output runs/bench-real-model-stages]

Runs the questions, the replies and the probe of the judge, each as a separate process with one thread, on the twelve general
seeds of real_model.py, twice: `before`, with glibc's mmap threshold fixed at 128 KiB, as earlier versions set it for every
model above 64 MiB, and `after`, as the package sets it today. Reported for each stage are the user and system CPU seconds, the
page faults and the peak memory of its process; loading the libraries and the model is included each time.

The judge of the default model, SmolLM2-135M-Instruct, cannot judge, and the probe ends the run there; its findings are
copied to the results. A rerun keeps what is measured. The time to the diagnosis is the sum of the three stages.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import write
from real_model import GENERAL, model_folder

STAGES = ("questions", "replies", "verdicts")
ARMS = {"before": {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}, "after": {}}
SETTINGS = (
    "questions.train=24",
    "questions.test=4",
    "verdicts.max_new_tokens=64",
    "backbone.device=cpu",
    "backbone.precision=fp32",
)


def run_stage(model: str, output: Path, stage: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run the loop up to a stage in a separate process; return its exit status and what it used."""
    seeds = output.with_suffix(".txt")
    seeds.write_text("".join(f"{seed}\n" for seed in GENERAL), encoding="utf-8")
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "selfeval", "run", "--model", model, "--seeds", str(seeds), "--output", str(output)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    status = subprocess.run([*command, "--until", stage, "--quiet", *settings], env=environment).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "exit_status": status,
        "user_seconds": round(after.ru_utime - before.ru_utime, 1),
        "system_seconds": round(after.ru_stime - before.ru_stime, 1),
        "page_faults": after.ru_minflt - before.ru_minflt,
        "peak_gib": round(after.ru_maxrss / 2**20, 2),  # of the largest child so far: later stages are larger
    }


def measure(model: str, output: Path, arm: str) -> dict[str, Any]:
    """Run the stages of an arm in an empty folder; return their figures and the probe's findings."""
    folder, known = output / arm, output / f"{arm}.json"
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stages = {stage: run_stage(model, folder / "run", stage, ARMS[arm]) for stage in STAGES}
    seconds = {name: round(sum(stage[name] for stage in stages.values()), 1) for name in ("user_seconds", "system_seconds")}
    probe = json.loads((folder / "run" / "probe.json").read_text(encoding="utf-8"))
    known.write_text(json.dumps({"stages": stages, **seconds, "probe": probe}), encoding="utf-8")
    return {"stages": stages, **seconds, "probe": probe}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model folder")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-real-model-stages"), help="folder of the runs")
    options = parser.parse_args()
    model = options.model or str(model_folder())
    arms = {arm: measure(model, options.output, arm) for arm in ARMS}
    figures = {"model": Path(model).name, "settings": SETTINGS, **arms}
    write("real_model_stages", "python benchmarks/real_model_stages.py", figures)


if __name__ == "__main__":
    main()
