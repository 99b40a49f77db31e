"""TRL's RewardTrainer, DPOTrainer, GRPOTrainer and RLOOTrainer, and lm-eval, on the exports of a run.

python benchmarks/peers/run.py [--run runs/embedded] [--folder runs/peers]

Runs the snippets of docs/guides/use-elsewhere.md as they are written, in an environment with TRL and lm-eval, which is built
first (`environment.py`). Without --run, a run of the embedded model is made at a small size. lm-eval is asked the run's test
questions, and its replies must all match those of this package's engine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import SMALL, selfeval, write
from environment import ROOT, build

from selfeval.backbone.role_files import load_role
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.judging.dialogue import evaluator_ids
from selfeval.records import Question
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.runs.templates import templates_of_run
from selfeval.store import RunStore, read_json

GUIDE = ROOT / "docs" / "guides" / "use-elsewhere.md"
LIMIT = 64
"""Reply length in tokens in the guide's task."""


def lay_out(folder: Path, run: Path) -> None:
    """Create a folder as the guide assumes it: runs/mine, and the exports."""
    (folder / "runs").mkdir(parents=True)
    shutil.copytree(run, folder / "runs" / "mine")
    for role in ("policy", "evaluator"):
        selfeval("export", str(run), "--role", role, "--merge", "--to", str(folder / "exported" / role), "--quiet")


def peer(python: Path, *arguments: str | Path, folder: Path) -> str:
    """Return the output of a command of the peers in a folder, with the network off to rule out downloads."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def trained(python: Path, folder: Path) -> dict[str, Any]:
    """Return the logs of the trainers in the guide's snippets."""
    out = peer(python, Path(__file__).with_name("snippets.py"), GUIDE, folder=folder)
    found: dict[str, Any] = json.loads(out.rsplit("RESULT ", 1)[1])
    return found


class Here:
    """Return the figures of the run in this package, for comparison."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.config = RunConfig.model_validate(read_json(run / "run.json")["config"])
        self.backbone = Backbone.load(self.config.model, self.config.backbone)
        load_role(self.backbone, "policy", run / "roles" / "policy")
        self.templates = templates_of_run(run, self.backbone.loaded.tokenizer, self.config.verdicts)
        self.end = self.backbone.loaded.eos_ids[:1]

    def questions(self) -> list[str]:
        store = RunStore(self.run)
        try:
            return [q.text for q in store.read("questions", Question) if q.split == "test"]
        finally:
            store.close()

    def replies(self, questions: Sequence[str]) -> list[str]:
        requests = [Request(self.templates.prompt("reply", question=q), temperature=0.0) for q in questions]
        with self.backbone.acting_as("policy"):
            rollouts = generate(self.backbone, requests, max_new_tokens=LIMIT, seed=0)
        return [self.templates.text(r.ids) for r in rollouts]

    def ids(self, found: dict[str, Any], row: dict[str, Any], number: int) -> dict[str, dict[str, list[int]]]:
        """Return the token ids that each trainer must produce for a pair."""
        question, prompt = found["prompts"][number], self.templates.prompt("reply", question=found["prompts"][number])
        sides = {f"{side}_ids": row[side] for side in ("chosen", "rejected")}
        graded = {
            name: evaluator_ids(self.templates, (question, r, found["reference_answer"][number]), self.end)
            for name, r in sides.items()
        }
        answered = {name: [*self.templates.reply_ids(r), *self.end] for name, r in sides.items()}
        return {
            "RewardTrainer": {name: list(ids) for name, ids in graded.items()},
            "DPOTrainer": {"prompt_ids": list(prompt.ids), **answered},
        }


def equal_ids(here: Here, found: dict[str, Any], pairs: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return whether the trainers' token ids of the first pairs are those of the run."""
    equal: dict[str, bool] = {}
    for number, row in enumerate(pairs[: len(found["prompts"])]):
        for trainer, ids in here.ids(found, row, number).items():
            equal[trainer] = equal.get(trainer, True) and found["trainers"][trainer]["ids"][number] == ids
    return equal


def evaluated(python: Path, folder: Path, here: Here) -> dict[str, Any]:
    """Return lm-eval's exact match with the replies of this package's engine, with and without the chat template."""
    (folder / "tasks").mkdir()
    (task,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (command,) = re.findall(r"^lm_eval (.*)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    (folder / "tasks" / "mine.yaml").write_text(task, encoding="utf-8")
    questions = here.questions()
    rows = [{"question": q, "answer": a} for q, a in zip(questions, here.replies(questions), strict=True)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "tasks" / "mine.jsonl").write_text(lines, encoding="utf-8")
    figures: dict[str, Any] = {"n": len(rows)}
    for name, arguments in (("chat_template", command), ("bare_question", command.replace(" --apply_chat_template", ""))):
        out = folder / f"lm-eval-{name}"
        peer(python, "-m", "lm_eval", *arguments.split(), "--output_path", out, folder=folder)
        (results,) = out.rglob("results_*.json")
        figures[name] = read_json(results)["results"]["mine"]["exact_match,stripped"]
    return figures


def measure(python: Path, folder: Path, run: Path) -> dict[str, Any]:
    """Run all comparisons on one run."""
    lay_out(folder, run)
    here, found = Here(run), trained(python, folder)
    paths = sorted((run / "pairs" / "train").glob("shard-*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    equal = equal_ids(here, found, rows)
    trainers = {
        name: {"steps": seen["steps"], "equal_ids": equal.get(name), "log": seen["log"]}
        for name, seen in found["trainers"].items()
    }
    return {"peers": found["versions"], "trainers": trainers, "lm_eval": evaluated(python, folder, here)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run; without it a small one is made")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "peers", help="where everything is written")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    run = given.run
    if run is None:
        run = given.folder / "run"
        selfeval("run", "--output", str(run), *(part for size in SMALL for part in ("--set", size)))
    figures = measure(build(), given.folder.resolve() / "work", run.resolve())
    write("peers", "python benchmarks/peers/run.py", figures)


if __name__ == "__main__":
    main()
