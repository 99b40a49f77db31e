"""The outside check: the pure functions that train language models learn Gymnasium's classic-control tasks.

python benchmarks/control/run.py                                         everything that results/control.json lacks
python benchmarks/control/run.py --task Pendulum-v1 --learner sac --seeds 2

Every run of a task, a learner and a seed is kept as soon as it ends, so that a killed command goes on where it was; a run whose
settings have changed is done anew. One core is enough. Gymnasium alone is installed, into build/gymnasium.
"""

from __future__ import annotations

import argparse
import json
import math
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
from selfeval.quality.statistics import mean_figure

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import RESULTS, write  # noqa: E402

EPISODES = 100
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
        ),
    },
    "Acrobot-v1": {
        "ppo": ppo.PPO(200_000, 16, 256, epochs=4, minibatch=64, gamma=0.99, lam=0.94, learning_rate=3e-4),
        "trpo": trpo.TRPO(100_000, 8, 256, gamma=0.99, lam=0.95, critic_epochs=15),
    },
    "Pendulum-v1": {
        "sac": sac.SAC(10_000, 1, batch=128),
        "ppo": ppo.PPO(100_000, 4, 1024, epochs=10, minibatch=64, gamma=0.9, lam=0.95, learning_rate=1e-3),
    },
}
"""Those of rl-baselines3-zoo where nothing is said; where they differ, docs/algorithms/control-check.md says so."""

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
    """Trains once, from this seed, and judges the greedy policy on fresh episodes."""
    settings = SETTINGS[task][learner]
    torch.manual_seed(seed)
    started, cpu = time.monotonic(), time.process_time()
    act = LEARNERS[learner](settings, Gymnasium(task, settings.environments, seed))
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - cpu
    returns = evaluate(act, Gymnasium(task, EPISODES, 1_000_000 + seed))
    return {
        "seed": seed,
        "steps": settings.steps,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "episodes": len(returns),
        "return": round(math.fsum(returns) / len(returns), 2),
        "least": round(min(returns), 2),
    }


def row(task: str, learner: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All seeds of one learner on one task: the mean with its interval over seeds, and what others published."""
    found = mean_figure([run["return"] for run in runs])
    published = {name: {"return": value, "steps": steps} for name, (value, steps) in PUBLISHED[task][learner].items()}
    return {
        "settings": asdict(SETTINGS[task][learner]),
        "return": {"value": found.value, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": found.n},
        "published": published,
        "reached": {name: found.value >= figure["return"] for name, figure in published.items()},
        "runs": runs,
    }


def kept() -> dict[str, Any]:
    """What results/control.json holds, without what was measured under other settings."""
    path = RESULTS / "control.json"
    tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else {}
    return {
        task: {name: old for name, old in rows.items() if old["settings"] == asdict(SETTINGS[task][name])}
        for task, rows in tasks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=SETTINGS)
    parser.add_argument("--learner", choices=LEARNERS)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    options = parser.parse_args()
    install()
    torch.set_num_threads(1)
    asked = [
        (task, learner)
        for task, learners in SETTINGS.items()
        for learner in learners
        if options.task in (None, task) and options.learner in (None, learner)
    ]
    if not asked:
        parser.error(f"{options.learner} does not learn {options.task}; it has {', '.join(SETTINGS[options.task])}")
    for number in range(options.seeds):
        for task, learner in asked:
            tasks = kept()
            runs = tasks.get(task, {}).get(learner, {"runs": []})["runs"]
            if number in (run["seed"] for run in runs):
                continue
            print(f"{task} {learner}, seed {number} of {options.seeds} ...", flush=True)
            runs = sorted([*runs, measure(task, learner, number)], key=lambda run: run["seed"])
            tasks.setdefault(task, {})[learner] = row(task, learner, runs)
            write("control", "python benchmarks/control/run.py", {"episodes": EPISODES, "tasks": tasks})
            print({name: value for name, value in runs[-1].items() if name != "episodes"}, flush=True)


if __name__ == "__main__":
    main()
