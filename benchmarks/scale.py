"""Workers on one machine: the overhead of Ray, the time with 1, 2 and 4 workers, and recovery from kills in all stages.

python benchmarks/scale.py [--workers 1 2 4] [--questions 6500] [--kills 100]

The times are those of runs of the embedded model up to the verdicts, with one CPU thread per process: wall seconds, and CPU
seconds, which another user of the machine changes less. The time in which workers start is apart. Shards are compared with
those of one process.

With --kills N, small runs of all stages on two workers are killed N times at random moments: a worker, the raylet of Ray, or
the command. A run that ended is resumed by the same command, at once. The seconds of a kill are those until the run got further
than ever before. At the end of each run, its shards, its trained roles and its report are compared with those of a run without
kills; the report without times and peak memory. Every figure is written when it is known, and a later call continues.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from common import RESULTS, write
from repeat import comparable

NAME = "scale"
MAPPED = ("replies", "verdicts")
TARGETS = {"worker": "ray::", "raylet": "raylet/raylet", "command": ""}
"""The processes that are killed, and a part of their command line."""
TOY = (
    *("questions.train=32", "questions.test=8", "questions.shard=20", "replies.per_question=2", "replies.shard=8"),
    *("verdicts.shard=8", "verdicts.calibration.method=off", "backbone.lora.rank=4", "evaluator.epochs=1", "evaluator.batch=4"),
    *("evaluator.checkpoint_every=2", "policy.gate=off", "policy.iterations=4", "policy.questions_per_iteration=4"),
    *("policy.replies_per_question=2", "policy.epochs=1", "policy.minibatch=8", "policy.checkpoint_every=1"),
    *("policy.warmup_iterations=0", "evaluation.questions=8"),
)
"""Settings of a run of a minute with all stages, whose policy and evaluator are good for nothing but their files."""
LONGEST_PAUSE = 15.0
"""Seconds of work after which a process is killed, at most."""
STUCK = 1200.0
"""Seconds after which a run that gets no further is counted as stuck."""
MOST_IN_A_RUN = 12
"""Kills of one run, which then ends undisturbed, so that there are reports to compare."""


def _command(folder: Path, settings: tuple[str, ...], *more: str) -> list[str]:
    sizes = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "selfeval", "run", "--quiet", "--force", "--output", str(folder), *sizes, *more]


def _environment() -> dict[str, str]:
    # Ray runs its workers at the lowest priority: on a busy machine the figures would be those of the other processes.
    return {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


def _shards(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("shard-*.jsonl"))}


def _roles(folder: Path) -> dict[str, bytes]:
    found = sorted((folder / "roles").rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


# -- numbers of workers -------------------------------------------------------------------------------------------------


class CpuSeconds:
    """CPU seconds of a command and of all processes that it has started, by kind.

    Each process is read twice a second, so the last half second of one that ends is not counted.
    """

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._seen, self._ended = process, dict[psutil.Process, tuple[str, float]](), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:  # it has ended
                return
            for one in family:
                self._read(one)

    def _read(self, one: psutil.Process) -> None:
        try:
            times, line = one.cpu_times(), " ".join(one.cmdline())
        except psutil.Error:
            return
        kind = "command" if one == self._process else "workers" if line.startswith("ray::Worker") else "ray"
        self._seen[one] = (kind, times.user + times.system)

    @contextmanager
    def counted(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()

    def by_kind(self) -> dict[str, float]:
        return {
            kind: round(sum(seconds for of, seconds in self._seen.values() if of == kind), 1)
            for kind in ("command", "workers", "ray")
        }


def measure(folder: Path, questions: int, workers: int) -> dict[str, Any]:
    """Run up to the verdicts; workers = 0 is one process without Ray."""
    shutil.rmtree(folder, ignore_errors=True)
    shard = max(1, questions // 16)
    sizes = (f"questions.train={questions * 2 // 3}", f"questions.test={questions - questions * 2 // 3}")
    shards = (f"replies.shard={shard}", f"verdicts.shard={shard}", "verdicts.calibration.method=off")
    number = ("--workers", str(workers)) if workers else ()
    started = time.monotonic()
    process = subprocess.Popen(_command(folder, (*sizes, *shards), "--until", "verdicts", *number), env=_environment())
    cpu = CpuSeconds(psutil.Process(process.pid))
    with cpu.counted():
        assert process.wait() == 0
    wall, run = time.monotonic() - started, json.loads((folder / "run.json").read_text("utf-8"))
    mapped = sum(run["stages"][name]["seconds"] for name in MAPPED)
    starting = run["workers"]["starting"] if workers else 0.0
    return {"wall": round(wall, 1), "mapped": round(mapped, 1), "starting": starting, "cpu": cpu.by_kind()}


def compare(figures: dict[str, Any], work: Path, questions: int, numbers: list[int]) -> None:
    """Measure one process and each number of workers, and compare their shards."""
    for workers in (0, *numbers):
        folder, name = work / f"workers-{workers}", str(workers)
        if name not in figures["runs"] or not folder.is_dir():
            figures["runs"][name] = measure(folder, questions, workers)
        figures["runs"][name]["same_shards"] = _shards(folder) == _shards(work / "workers-0")
        save(figures)
        print(f"{workers} workers: {figures['runs'][name]}", flush=True)


# -- kills --------------------------------------------------------------------------------------------------------------


class KilledRun:
    """A run on two workers that is killed again and again, and resumed by the same command.

    Args:
        folder: its folder.
        seed: of the moments and the victims.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self._rng = folder, random.Random(seed)
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        (self.folder / "progress.json").unlink(missing_ok=True)  # that of a killed process
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        log = (self.folder.parent / "output.log").open("ab")
        return subprocess.Popen(_command(self.folder, TOY, "--workers", "2"), env=_environment(), stdout=log, stderr=log)

    def kills(self, most: int) -> Iterator[dict[str, Any]]:
        """Kill the run at random moments, at most so many times; yield each kill when the run has recovered."""
        for _ in range(most):
            if not self._works():
                return
            time.sleep(self._rng.uniform(0.0, LONGEST_PAUSE))
            kill = self._kill()
            if kill is None:
                return
            yield kill

    def finish(self) -> None:
        """Let the run end undisturbed."""
        until = time.monotonic() + 2 * STUCK
        while not self._is_finished():
            assert time.monotonic() < until, f"{self.folder} does not end"
            self._resume()
            time.sleep(0.2)
        self._process.wait(STUCK)

    def _is_finished(self) -> bool:
        return (self.folder / "report" / "manifest.json").is_file()

    def _resume(self) -> None:
        if self._process.poll() is not None and not self._is_finished():
            self._process = self._start()

    def _works(self) -> bool:
        """Wait until the run is in a stage, and return whether it is; False if it is finished."""
        until = time.monotonic() + STUCK
        while not self._stage():
            if self._is_finished():
                return False
            assert time.monotonic() < until, f"{self.folder} does not begin"
            self._resume()
            time.sleep(0.1)
        return True

    def _stage(self) -> str:
        try:
            return str(json.loads((self.folder / "progress.json").read_text("utf-8"))["stage"])
        except (OSError, ValueError):
            return ""

    def _kill(self) -> dict[str, Any] | None:
        """Kill a process and wait until the run gets further; None if it has finished before."""
        target, stage = self._rng.choice(list(TARGETS)), self._stage()
        victims = self._victims(target)
        if not victims:  # no stage has workers all the time
            target = "command"
            victims = self._victims(target)
        if self._is_finished() or not victims:
            return None
        before, killed = self._reached(), time.monotonic()
        self._rng.choice(victims).send_signal(signal.SIGKILL)
        while self._reached() <= before and time.monotonic() - killed < STUCK:
            self._resume()
            time.sleep(0.1)
        stuck = self._reached() <= before
        if stuck:
            self._process.kill()
        return {"target": target, "stage": stage, "seconds": round(time.monotonic() - killed, 1), "stuck": stuck}

    def _victims(self, target: str) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        found, command = [], psutil.Process(self._process.pid)
        if target == "command":
            return [command]
        for process in command.children(recursive=True):
            try:
                if TARGETS[target] in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended in the meantime
                continue
        return found

    def _reached(self) -> int:
        """Return how far the run is: shards, finished stages, and the steps of the last checkpoint of each training."""
        count = len(list(self.folder.rglob("shard-*.jsonl"))) + len(list(self.folder.glob("*/manifest.json")))
        last: dict[Path, int] = {}
        for path in self.folder.glob("checkpoints/**/step-*"):
            last[path.parent] = max(last.get(path.parent, 0), int(path.name[len("step-") :].partition(".")[0]))
        return count + sum(last.values()) + 1000 * self._is_finished()


def chaos(figures: dict[str, Any], work: Path, kills: int) -> None:
    """Kill processes until there were so many kills; compare every run at its end."""
    found: list[dict[str, Any]] = figures.setdefault("kills", [])
    compared: list[dict[str, Any]] = figures.setdefault("compared", [])
    calm = work / "calm" / "toy"
    if len(found) < kills and not (calm / "report" / "manifest.json").is_file():
        KilledRun(calm, 0).finish()
    while len(found) < kills:
        folder = work / f"killed-{len(compared)}" / "toy"  # the same name, which the report has
        run = KilledRun(folder, seed=len(found))
        in_this_run = [kill for kill in found if kill["run"] == len(compared)]
        for kill in run.kills(min(kills - len(found), MOST_IN_A_RUN - len(in_this_run))):
            found.append({"run": len(compared), **kill})
            save(figures)
            print(f"kill {len(found)}: {found[-1]}", flush=True)
        run.finish()
        compared.append(_compared(folder, calm))
        save(figures)
        print(f"run {len(compared)}: {compared[-1]}", flush=True)


def _compared(folder: Path, calm: Path) -> dict[str, Any]:
    ours, theirs = comparable(folder), comparable(calm)
    return {
        "same_shards": _shards(folder) == _shards(calm),
        "same_roles": _roles(folder) == _roles(calm),
        "report_differs_in": [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)],
    }


def save(figures: dict[str, Any]) -> None:
    write(NAME, "python benchmarks/scale.py --kills 100", figures)


def earlier(questions: int) -> dict[str, Any]:
    """Return the figures of an earlier call. Those of another number of questions are measured again."""
    path = RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    runs = found.get("runs", {}) if found.get("questions") == questions else {}
    kept = {name: found[name] for name in ("kills", "compared") if name in found}
    return {"questions": questions, "runs": runs, **kept}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--questions", type=int, default=6500)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--only", choices=("times", "kills"), help="one of the two parts; default: both")
    parser.add_argument("--work", type=Path, default=Path("runs") / "scale", help="folder of the runs")
    asked = parser.parse_args()
    known = earlier(asked.questions)
    if asked.only != "kills":
        compare(known, asked.work, asked.questions, asked.workers)
    if asked.only != "times":
        chaos(known, asked.work, asked.kills)
