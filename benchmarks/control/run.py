"""The outside check: the pure functions that train language models learn Gymnasium's classic-control tasks.

python benchmarks/control/run.py                                         everything; writes results/control.json
python benchmarks/control/run.py --task Pendulum-v1 --learner sac --seeds 2

Every run of a task, a learner and a seed is kept in runs/bench-control as soon as it ends, so a killed command resumes
where it stopped; a run whose settings changed is repeated. One core is enough. Gymnasium is installed into build/gymnasium.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dqn
import ppo
import sac
import trpo
from environments import Act, Environments, Gymnasium, evaluate, install
from selfeval.store import writing

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import write

EPISODES = {"CartPole-v1": 100, "Acrobot-v1": 100, "Pendulum-v1": 1000}
"""A return that depends mostly on the initial state, as with a pendulum, needs many episodes."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5% quantile of Student's t by number of seeds."""
Train = Callable[[Any, Environments], Act]
LEARNERS: dict[str, Train] = {"ppo": ppo.train, "trpo": trpo.train, "dqn": dqn.train, "sac": sac.train}

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "ppo": ppo.PPO(50_000, 8, 32, epochs=20, minibatch=256, gamma=0.98, lam=0.8, learning_rate=1e-3, anneal=True),
        "trpo": trpo.TRPO(50_000, 8, 128, gamma=0.99, lam=0.98, critic_epochs=20),
        "dqn": dqn.DQN(
            50_000,
            8,
            32,
            updates=128,
            batch=64,
            gamma=0.99,
            learning_rate=2.3e-3,
            exploration_steps=8_000,
            least_exploration=0.04,
            target_every=256,
            width=256,
        ),
    },
    "Acrobot-v1": {
        "ppo": ppo.PPO(200_000, 16, 256, epochs=4, minibatch=64, gamma=0.99, lam=0.94, learning_rate=3e-4),
        "trpo": trpo.TRPO(100_000, 8, 256, gamma=0.99, lam=0.95, critic_epochs=15),
        "dqn": dqn.DQN(
            100_000,
            8,
            1,
            updates=2,
            batch=64,
            gamma=0.99,
            learning_rate=1e-3,
            exploration_steps=12_000,
            least_exploration=0.1,
            target_every=1_000,
            width=128,
        ),
    },
    "Pendulum-v1": {
        "sac": sac.SAC(10_000, 1, batch=128),
        "ppo": ppo.PPO(100_000, 4, 1024, epochs=10, minibatch=64, gamma=0.9, lam=0.95, learning_rate=1e-3, anneal=True),
        "trpo": trpo.TRPO(100_000, 8, 256, gamma=0.9, lam=0.95, critic_epochs=15),
    },
}
"""Settings of rl-baselines3-zoo unless noted; docs/algorithms/control-check.md lists the differences."""

PUBLISHED: dict[str, dict[str, dict[str, tuple[float, int]]]] = {
    "CartPole-v1": {
        "ppo": {"SB3 zoo": (500.0, 100_000), "CleanRL": (490.0, 500_000)},
        "trpo": {"SB3 zoo": (500.0, 100_000)},
        "dqn": {"SB3 zoo": (500.0, 50_000), "CleanRL": (488.7, 500_000)},
    },
    "Acrobot-v1": {
        "ppo": {"SB3 zoo": (-73.5, 1_000_000), "CleanRL": (-86.4, 500_000)},
        "trpo": {"SB3 zoo": (-83.1, 100_000)},
        "dqn": {"SB3 zoo": (-76.6, 100_000), "CleanRL": (-91.5, 500_000)},
    },
    "Pendulum-v1": {
        "sac": {"SB3 zoo": (-157.0, 20_000)},
        "ppo": {"SB3 zoo": (-172.2, 100_000)},
        "trpo": {"SB3 zoo": (-174.6, 100_000)},
    },
}
"""Mean return and training steps: one run of rl-baselines3-zoo (benchmark.md), three of CleanRL (docs, benchmark pages)."""


def measure(task: str, learner: str, seed: int) -> dict[str, Any]:
    """Train once from this seed, and evaluate the greedy policy on fresh episodes."""
    settings = SETTINGS[task][learner]
    torch.manual_seed(seed)
    started, cpu = time.monotonic(), time.process_time()
    act = LEARNERS[learner](settings, Gymnasium(task, settings.environments, seed))
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu
    returns = evaluate(act, Gymnasium(task, EPISODES[task], 1_000_000 + seed))
    return {
        "seed": seed,
        "steps": settings.steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "episodes": len(returns),
        "return": round(statistics.fmean(returns), 2),
        "least": round(min(returns), 2),
    }


def kept(task: str, learner: str, seed: int, folder: Path) -> dict[str, Any] | None:
    """Return a finished run, or None unless it had the current settings and number of evaluation episodes."""
    path = folder / f"{task}-{learner}-{seed}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    run: dict[str, Any] = found["run"]
    same = found["settings"] == asdict(SETTINGS[task][learner]) and run["episodes"] == EPISODES[task]
    return run if same else None


def run_once(task: str, learner: str, seed: int, folder: Path) -> None:
    """Measure and store one run unless it exists."""
    if kept(task, learner, seed, folder):
        return
    print(f"{task} {learner}, seed {seed} ...", flush=True)
    run = measure(task, learner, seed)
    print(f"  return {run['return']:.1f} after {run['steps']:,} steps, {run['cpu_seconds']:.0f} CPU seconds", flush=True)
    with writing(folder / f"{task}-{learner}-{seed}.json") as part:
        part.write_text(json.dumps({"settings": asdict(SETTINGS[task][learner]), "run": run}), encoding="utf-8")


def figure(values: list[float]) -> dict[str, Any]:
    """Return the mean over seeds with Student's 95% interval: a bootstrap's would be too narrow for a handful."""
    mean, n = statistics.fmean(values), len(values)
    half = STUDENT[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    low, high = (None, None) if half is None else (round(mean - half, 2), round(mean + half, 2))
    return {"value": round(mean, 2), "ci_low": low, "ci_high": high, "n": n}


def row(task: str, learner: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of one learner on one task with its interval over seeds, and the published results."""
    found = figure([run["return"] for run in runs])
    published = {name: {"return": value, "steps": steps} for name, (value, steps) in PUBLISHED[task][learner].items()}
    return {
        "settings": asdict(SETTINGS[task][learner]),
        "return": found,
        "published": published,
        "reached": {name: found["value"] >= theirs["return"] for name, theirs in published.items()},
        "runs": runs,
    }


def collected(asked: list[tuple[str, str]], seeds: int, folder: Path) -> dict[str, Any]:
    """Return the rows of all finished runs, and the number of missing seeds by row."""
    tasks: dict[str, dict[str, Any]] = {task: {} for task, _ in asked}
    missing = {}
    for task, learner in asked:
        runs = [run for seed in range(seeds) if (run := kept(task, learner, seed, folder))]
        if runs:
            tasks[task][learner] = row(task, learner, runs)
        if len(runs) < seeds:
            missing[f"{task} {learner}"] = seeds - len(runs)
    return {"tasks": tasks, "missing_seeds": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETTINGS)
    parser.add_argument("--learner", choices=LEARNERS)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 11), help="how many")
    parser.add_argument("--finished", action="store_true", help="run nothing; write results/control.json from finished runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-control"), help="where finished runs are kept")
    options = parser.parse_args()
    install()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    asked = [
        (task, learner)
        for task, learners in SETTINGS.items()
        for learner in learners
        if options.task in (None, task) and options.learner in (None, learner)
    ]
    if not asked:
        parser.error(f"{options.learner} does not learn {options.task}; it has {', '.join(SETTINGS[options.task])}")
    if not options.finished:
        for seed in range(options.seeds):  # the first seed of all learners comes first, for an early look at each
            for task, learner in asked:
                run_once(task, learner, seed, options.folder)
    if options.task or options.learner:
        print("results/control.json is written by the command without --task and --learner")
        return
    write("control", "python benchmarks/control/run.py", collected(asked, options.seeds, options.folder))


if __name__ == "__main__":
    main()
