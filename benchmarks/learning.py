"""Train one policy on the evaluator of a finished run with the code of the stage; measure gold before and after.

Shared by the benchmarks of policy learning: questions, replies and the evaluator come from a run of `benchmarks/loop.py` and
are reused for every setting. Each training runs in a separate process with one thread:

python benchmarks/learning.py --run runs/bench-loop/seed-0 --seed 3 --set learning_rate=5e-4 --to out.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TEST_QUESTIONS = 500


def train(run: Path, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """Train a policy in this process; return settings, metrics of each iteration, gold before and after, seconds, peak."""
    from selfeval.backbone.adapters import BASE
    from selfeval.backbone.meters import peak_resident_bytes
    from selfeval.config import RunConfig, load_config
    from selfeval.stages.context import Context
    from selfeval.stages.gold import load_gold
    from selfeval.stages.policy import add_roles, learner_context, prompts_of
    from selfeval.stages.terminal import Terminal
    from selfeval.store import RunStore, read_json
    from selfeval.training.context import POLICY
    from selfeval.training.policy import train_policy
    from selfeval.training.recorder import CheckpointRecorder

    saved = read_json(run / "run.json")["config"]
    assignments = [f"seed={seed}", *(f"policy.{setting}" for setting in settings)]
    known = {name: value for name, value in saved.items() if name in RunConfig.model_fields and name != "policy"}
    recipe = load_config(Path("recipes/embedded.toml"), {}, assignments)
    config = RunConfig.model_validate({**known, "seed": seed, "policy": recipe.policy})
    view = _view(run)
    context = Context(config, RunStore(view), Terminal(quiet=True))
    gold = load_gold(config)
    assert gold is not None
    questions = {q.id: q.text for q in context.questions("train")}  # type: ignore[arg-type]
    lines: list[dict[str, Any]] = []
    alarms: list[dict[str, Any]] = []

    class GoldRecorder(CheckpointRecorder):
        """Evaluate each iteration's replies by gold, and keep its metrics."""

        def samples(self, iteration: int, samples: Any, scores: Any) -> None:
            texts = [context.templates.text(r.ids) for r in samples.rollouts]
            right = [gold.is_right(questions[p.question_id], t) for p, t in zip(samples.asked, texts, strict=True)]
            scored = [[round(s, 4), int(bool(x))] for s, x in zip(scores.whole_B.tolist(), right, strict=True)]
            lines.append({"gold": sum(x for _, x in scored) / len(scored), "replies": scored})

        def metrics(self, values: dict[str, float], seen: Any) -> None:
            lines[-1] |= values
            alarms.extend(alarm.as_json() for alarm in seen)

    add_roles(context)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        recorder = GoldRecorder(Path(folder), context.backbone)
        guide = train_policy(learner_context(context), prompts_of(context), recorder)
    seconds = time.monotonic() - started
    before, after = gold_share(context, gold, BASE), gold_share(context, gold, POLICY, guide)
    shutil.rmtree(view)
    return {
        "run": run.name,
        "seed": seed,
        "settings": list(settings),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_resident_bytes(),
        "gold_before": before,
        "gold_after": after,
        "samples": sum(1 for _ in lines) * config.policy.questions_per_iteration * config.policy.replies_per_question,
        "alarms": alarms,
        "iterations": lines,
    }


def train_or_stop(run: Path, seed: int, settings: Sequence[str]) -> dict[str, Any]:
    """Train a policy; if a watchdog stops it, return the settings with the reason in `failed`."""
    from selfeval.errors import LoopError

    try:
        return train(run, seed, settings)
    except LoopError as error:
        return {"run": run.name, "seed": seed, "settings": list(settings), "failed": [str(error)]}


def _view(run: Path) -> Path:
    """Create a folder with the run's data, because parallel trainings cannot share its lock."""
    folder = Path(tempfile.mkdtemp())
    for name in ("questions", "reference_answers", "pairs", "roles"):
        shutil.copytree(run / name, folder / name)  # a run folder must not contain links that leave it
    shutil.copy(run / "run.json", folder)
    return folder


def gold_share(context: Any, gold: Any, role: str, guide: Any = None) -> dict[str, Any]:
    """Return the share of right replies to test questions at the policy's temperature, before or after training."""
    from selfeval.quality.statistics import proportion
    from selfeval.records import Split
    from selfeval.stages.evaluation_work import sample_replies

    asked = context.questions(Split.TEST)[:TEST_QUESTIONS]
    prompts = [context.templates.prompt("reply", question=q.text) for q in asked]
    limit = context.reply_limit
    replies = sample_replies(context.model, context.config, prompts, guide, limit=limit, seed=12345, role=role)
    right = [gold.is_right(q.text, context.templates.text(r.ids)) for q, r in zip(asked, replies, strict=True)]
    return proportion([bool(x) for x in right]).as_json()


def train_all(jobs: Sequence[dict[str, Any]], folder: Path, workers: int = 2) -> list[dict[str, Any]]:
    """Run many trainings, each in a separate process; skip those that already have a result.

    A training that a watchdog stopped has a result, with the reason in `failed`: its settings are unstable. Any other error
    says nothing about the settings, so it is no result, and the same command runs the training again.

    Args:
        jobs: each `{"name", "run", "seed", "settings"}`; `name` is the name of the result file.
        workers: number of trainings in parallel.

    Raises:
        SystemExit: at the end, if trainings had errors; the message lists them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    errors: list[str] = []

    def one(job: dict[str, Any]) -> dict[str, Any] | None:
        path = folder / f"{job['name']}.json"
        if not path.is_file():
            command = [sys.executable, __file__, "--run", job["run"], "--seed", str(job["seed"]), "--to", str(path)]
            for setting in job["settings"]:
                command += ["--set", setting]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
            if done.returncode:
                errors.append(f"{job['name']}: {done.stderr.strip().splitlines()[-1:]}")
                print(errors[-1], flush=True)
                return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        after = result.get("gold_after", {}).get("value")
        said = f"gold {after:.3f}" if after is not None else f"stopped: {result.get('failed', 'nothing has gold')}"
        print(f"{job['name']}: {said}", flush=True)
        return result

    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(one, jobs))
    if errors:
        raise SystemExit(f"{len(errors)} of {len(jobs)} trainings had errors; the same command runs only these again: {errors}")
    return [result for result in results if result is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], help="a value of [policy], e.g. learning_rate=5e-4 or ppo.clip=0.1"
    )
    parser.add_argument("--to", type=Path, required=True, help="the file that the result goes to")
    options = parser.parse_args()
    result = train_or_stop(options.run, options.seed, options.set)
    partial = options.to.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.replace(options.to)


if __name__ == "__main__":
    main()
