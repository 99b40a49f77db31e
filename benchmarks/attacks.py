"""Evaluators that are trained with different additional pairs, against gold and against attack replies.

python benchmarks/attacks.py [--recipe recipes/embedded.toml] [--seeds 0 1 2] [--test 7600] [--output runs/bench-attacks]

Runs the recipe up to its pairs once per seed, then trains one evaluator per setting on the same pairs. Measures it on all test
pairs with one right reply, whatever the judge's verdict (gold accuracy: of all of them, where the longer or the shorter reply
is right, where the judge was sure, and of the families of word problems), and on attack replies to all test questions. A rerun
resumes: finished evaluators are kept and finished measurements are read.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import selfeval, write

from selfeval.config.load import config_of_run
from selfeval.evaluation.evaluator import LabelledPair, by_gold
from selfeval.lab.domain import read_problem
from selfeval.quality.statistics import proportion
from selfeval.records import Question, Verdict, VerdictState
from selfeval.stages.attacks import attack_evaluator
from selfeval.stages.context import Context
from selfeval.stages.gold import load_gold
from selfeval.stages.held_out import score_pairs
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, read_json

SETTINGS = {
    "judged pairs only": (),
    "mismatched 0.3": ("evaluator.mismatched=0.3",),
    "attacks 0.3": ("evaluator.attacks=0.3",),
    "mismatched 0.3, attacks 0.3": ("evaluator.mismatched=0.3", "evaluator.attacks=0.3"),
    "mismatched 0.3, garbled 0.3": ("evaluator.mismatched=0.3", "evaluator.garbled=0.3"),
}


def prepared(recipe: str, seed: int, test: int, output: Path) -> Path:
    """Run a recipe up to its pairs, or resume it; return the run folder."""
    folder = output / f"seed-{seed}"
    settings = ("--set", f"seed={seed}", "--set", f"questions.test={test}")
    selfeval("run", recipe, "--output", str(folder), "--until", "pairs", "--quiet", *settings)
    return folder


def trained(run: Path, settings: tuple[str, ...], folder: Path) -> Path:
    """Copy a run and train its evaluator with other settings, or resume the training."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(run, part)
        part.rename(folder)
    more = [value for setting in settings for value in ("--set", setting)]
    selfeval("run", "--output", str(folder), "--until", "evaluator", "--quiet", *more)
    return folder


def measure(folder: Path) -> dict[str, Any]:
    """Return the accuracy by gold on the test pairs, and the shares of attacks that score lower."""
    file = folder / "run.json"
    config = config_of_run(read_json(file)["config"], file)
    every = config.evaluation.model_copy(update={"attacks": config.questions.test})
    context = Context(config.model_copy(update={"evaluation": every}), RunStore(folder), Terminal(quiet=True))
    gold = load_gold(config)
    assert gold is not None
    context.load_evaluators()
    questions = {q.id: q for q in context.store.read("questions", Question)}
    verdicts = [v for v in context.store.read("verdicts", Verdict) if v.split == "test"]

    def right_of(question: str, replies: tuple[str, str]) -> tuple[bool | None, bool | None]:
        return gold.is_right(question, replies[0]), gold.is_right(question, replies[1])

    pairs = by_gold(score_pairs(context, verdicts, questions, right_of=right_of))
    attacks = attack_evaluator(context, gold)
    assert attacks is not None
    return {"accuracy_gold": _accuracy(pairs), "parts": _parts(pairs, questions), "attacks": attacks.as_json()}


def _accuracy(pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    return proportion([pair.evaluator_right for pair in pairs]).as_json()


def _parts(pairs: Sequence[LabelledPair], questions: Mapping[str, Question]) -> dict[str, Any]:
    """Return the accuracy by the length of the right reply, of the judge's sure verdicts, and by family of word problems."""
    parts: dict[str, list[LabelledPair]] = {"longer is right": [], "shorter is right": [], "judge was sure": []}
    for labelled in pairs:
        better, worse = (len(labelled.pair.replies[i].text) for i in (labelled.better, 1 - labelled.better))
        if better != worse:
            parts["longer is right" if better > worse else "shorter is right"].append(labelled)
        if labelled.pair.verdict.state == VerdictState.KEPT:
            parts["judge was sure"].append(labelled)
        problem = read_problem(questions[labelled.pair.verdict.question_id].text)
        if problem is not None:
            parts.setdefault(f"family {problem.family.name}", []).append(labelled)
    return {name: _accuracy(part) for name, part in sorted(parts.items())}


def results_of(recipe: str, seed: int, test: int, output: Path) -> dict[str, Any]:
    """Return the figures of all settings for a seed; measure those that are missing."""
    run = prepared(recipe, seed, test, output)
    found = {}
    for number, (name, settings) in enumerate(SETTINGS.items()):
        path = output / f"seed-{seed}-{number}.json"
        if not path.is_file():
            figures = measure(trained(run, settings, output / f"seed-{seed}-{number}"))
            part = path.with_name(f"{path.name}.part")
            part.write_text(json.dumps(figures), encoding="utf-8")
            part.rename(path)
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        print(seed, name, _line(found[name]), flush=True)
    return found


def _line(figures: Mapping[str, Any]) -> str:
    attacks = figures["attacks"]
    kinds = " ".join(f"{row['kind']} {row['below']['value']:.3f}" for row in attacks["kinds"])
    return f"gold {figures['accuracy_gold']['value']:.3f}, attacks {attacks['total']['value']:.3f}: {kinds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/embedded.toml", help="recipe of a domain with gold")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test", type=int, default=7600, help="number of test questions")
    parser.add_argument("--output", type=Path, default=Path("runs/bench-attacks"), help="folder of the runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = [
        {"seed": seed, "settings": results_of(options.recipe, seed, options.test, options.output)} for seed in options.seeds
    ]
    test = "" if options.test == parser.get_default("test") else f" --test {options.test}"
    command = f"python benchmarks/attacks.py --seeds {' '.join(map(str, options.seeds))}{test}"
    write("attacks", command, {"recipe": Path(options.recipe).name, "runs": runs})


if __name__ == "__main__":
    main()
