"""Small runs of the embedded model on 1 and 2 workers, watched: CPU seconds of every process at every shard and every step.

Other jobs share the cores, so wall time says little here. CPU seconds of the busiest process are about the wall time that a
machine with a free core per process would need. Used by scale_model.py.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SETTINGS = {
    "questions.train": 96,
    "questions.test": 32,
    "questions.shard": 48,
    "replies.shard": 8,
    "replies.max_new_tokens": 64,
    "verdicts.shard": 8,
    "verdicts.keep": 0.5,
    "verdicts.max_new_tokens": 40,
    "verdicts.calibration.method": "off",
    "evaluator.epochs": 3,
    "evaluator.batch": 16,
    "evaluator.held_out": 0.05,
    "policy.gate": "off",
    "policy.iterations": 6,
    "policy.questions_per_iteration": 16,
    "policy.minibatch": 32,
    "policy.checkpoint_every": 100,
    "policy.warmup_iterations": 0,
    "evaluation.questions": 32,
    "evaluation.map_points": 0,
}
"""Two minutes on one core. No calibration, no gate and no map: parts that do not grow with the number of workers."""

_PERIOD = 0.5


@dataclass(frozen=True)
class Moment:
    """The progress of a run when it changed, and the CPU seconds of each process so far.

    Attributes:
        done: shards of questions, replies and verdicts, steps of the evaluator, iterations of the policy.
        driver: CPU seconds of the process of the command.
        workers: CPU seconds of each worker, by its process.
    """

    done: dict[str, int]
    driver: float
    workers: dict[int, float]


@dataclass
class Watched:
    """A run: its moments, and CPU seconds of all processes at the end, those of Ray apart."""

    moments: list[Moment] = field(default_factory=list)
    ray: float = 0.0


def command(folder: Path, workers: int) -> list[str]:
    """Return the command of a run."""
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "selfeval", "run", "--quiet", "--output", str(folder), "--workers", str(workers), *settings]


def watch(folder: Path, workers: int) -> Watched:
    """Run anew in a folder, and note the CPU seconds of its processes whenever it has made progress."""
    shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen(command(folder, workers), env={**os.environ, "OMP_NUM_THREADS": "1"})
    found, seen, ray = Watched(), psutil.Process(process.pid), dict[int, float]()
    last: dict[str, int] = {}
    while process.poll() is None:
        done = progress(folder)
        driver, crew = _cpu_seconds(seen, ray)
        if done != last and driver:
            found.moments.append(Moment(done, driver, crew))
            last = done
        time.sleep(_PERIOD)
    if process.returncode:
        raise SystemExit(f"the run in {folder} failed with exit code {process.returncode}")
    found.ray = sum(ray.values())
    return found


def progress(folder: Path) -> dict[str, int]:
    """Count the finished shards and steps."""
    shards = {name: len(list(folder.glob(f"{name}/shard-*.jsonl"))) for name in ("questions", "replies", "verdicts")}
    lines = {name: _lines(folder / "metrics" / f"{name}.jsonl") for name in ("evaluator", "policy")}
    return {**shards, **lines, "report": (folder / "report.json").is_file()}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _cpu_seconds(driver: psutil.Process, ray: dict[int, float]) -> tuple[float, dict[int, float]]:
    """Return CPU seconds of the driver and of the workers; note those of Ray's own processes."""
    workers = {}
    try:
        own = _seconds(driver)
        children = driver.children(recursive=True)
    except psutil.Error:  # it has just ended
        return 0.0, {}
    for child in children:
        try:
            name, used = " ".join(child.cmdline()), _seconds(child)
        except psutil.Error:
            continue
        if name.startswith("ray::") and "Worker" in name:
            workers[child.pid] = used
        else:
            ray[child.pid] = used
    return own, workers


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


# -- figures of a watched run -------------------------------------------------------------------------------------------


def between(watched: Watched, name: str, first: int, last: int) -> tuple[float, dict[int, float]]:
    """Return CPU seconds of the driver and of each worker between two counts of a stage."""
    start, end = (next(m for m in watched.moments if m.done[name] >= count) for count in (first, last))
    return end.driver - start.driver, {pid: used - start.workers.get(pid, 0.0) for pid, used in end.workers.items()}


def per_unit(watched: Watched, name: str) -> list[float]:
    """Return CPU seconds of each shard or step after the first, of the process that computes them alone."""
    found: list[float] = []
    for before, after in zip(watched.moments, watched.moments[1:], strict=False):
        units = after.done[name] - before.done[name]
        if units and before.done[name]:
            busy = [used - before.workers.get(pid, 0.0) for pid, used in after.workers.items()]
            found += [max([after.driver - before.driver, *busy]) / units] * units
    return found


def busiest(watched: Watched, name: str) -> dict[str, float]:
    """Return the units after the first of a stage, and the CPU seconds of the busiest process in them, and of all."""
    last = watched.moments[-1].done[name]
    driver, workers = between(watched, name, 1, last)
    used = [driver, *workers.values()]
    return {"units": last - 1, "busiest": round(max(used), 3), "all": round(sum(used), 3), "driver": round(driver, 3)}


def bytes_of(folder: Path) -> dict[str, float]:
    """Return the mean sizes of the results of a shard, and the size of a checkpoint and of an adapter."""
    sizes = {name: [path.stat().st_size for path in folder.glob(f"{name}/shard-*.jsonl")] for name in ("replies", "verdicts")}
    found = {f"shard of {name}": round(sum(some) / len(some)) for name, some in sizes.items()}
    return {**found, "adapter": (folder / "roles" / "policy" / "adapter_model.safetensors").stat().st_size}


def counts_of(folder: Path) -> dict[str, Any]:
    """Return the number of records that were trained on, and lengths in tokens: means, and the mean of a shard's longest."""
    rows = json.loads((folder / "run.json").read_text("utf-8"))["stages"]
    tokens = json.loads((folder / "report.json").read_text("utf-8"))["evaluator"]["cost"]
    judge, scoring = tokens["judge"], tokens["scoring"]
    shards = [_reply_lengths(path) for path in folder.glob("replies/shard-*.jsonl")]
    reply = statistics.fmean(length for shard in shards for length in shard)
    return {
        "trained_pairs": rows["evaluator"]["counts"]["trained"],
        "longest_reply": round(statistics.fmean(map(max, shards)), 2),
        # The judge reads a pair in both orders, and the evaluator reads its two replies.
        "lengths": {
            "reply": round(reply, 2),
            "grade": round(scoring["tokens_read"]["value"] / 2 - reply, 2),
            "judge": round(judge["tokens_read"]["value"] / 2, 2),
            "reasoning": round(judge["tokens_written"]["value"] / 2, 2),
        },
        "seconds": {name: row["seconds"] for name, row in rows.items()},
    }


def _reply_lengths(path: Path) -> list[int]:
    return [len(json.loads(line)["ids"]) for line in path.read_text("utf-8").splitlines()]


def measure(work: Path, workers: int) -> dict[str, Any]:
    """Return the figures of a run with a number of workers."""
    folder = work / f"workers-{workers}"
    watched = watch(folder, workers)
    stages = {name: busiest(watched, name) for name in ("replies", "verdicts", "evaluator", "policy")}
    return {
        "workers": workers,
        "stages": stages,
        "ray": round(watched.ray, 1),
        "units": {name: [round(s, 3) for s in per_unit(watched, name)] for name in stages} if workers == 1 else {},
        "bytes": bytes_of(folder),
        "counts": counts_of(folder),
    }
