"""Measure the options of the evaluator one by one, and what flipped labels do to it with soft and hard labels.

python benchmarks/evaluator_options.py [--seeds 0 1 2] [--pairs 180] [--folder runs/bench-evaluator-options]

Makes the pairs of one run of the embedded model once. For each setting and seed, trains the evaluator of the run on the same
pairs, which are few so that there are errors left to remove, and scores the test pairs with exactly one right reply by gold,
and attack replies. The seed changes the initial weights, the order of the pairs, the held-out pairs and the additional pairs;
all settings have the same seeds. A rerun resumes: finished measurements are read.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from common import selfeval, write

from selfeval.config import EvaluatorConfig, RunConfig
from selfeval.evaluation.evaluator import by_gold
from selfeval.quality.calibration import calibration_error
from selfeval.quality.comparisons import compare_paired
from selfeval.quality.statistics import mean_figure, sigmoid
from selfeval.records import Pair, Question, Split, Verdict
from selfeval.stages import evaluator
from selfeval.stages.attacks import attack_evaluator
from selfeval.stages.context import Context
from selfeval.stages.gold import Gold, load_gold
from selfeval.stages.held_out import score_pairs
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, read_json, write_json

SIZES = ("questions.train=1000", "questions.test=2600")
COMMON = {"held_out": 0.35, "checkpoint_every": 1000}
"""A larger held-out share than the recipe's, so that the temperature is fitted on at least 50 of the few pairs."""
ATTACKED = 30
SCORED = 1000
DEFAULT = "default"


@dataclass(frozen=True)
class Arm:
    """An evaluator.

    Attributes:
        settings: those that are not the common ones.
        flipped: share of the training labels that are flipped.
        against: arm that it is compared with.
        seeds: number of seeds, from the first; None for all. A training of several members takes several times as long.
    """

    settings: Mapping[str, Any]
    flipped: float = 0.0
    against: str = DEFAULT
    seeds: int | None = None


def _flips() -> dict[str, Arm]:
    found: dict[str, Arm] = {}
    for share in (0.1, 0.2, 0.3):
        soft, hard = (f"{share:.0%} of labels flipped, {labels}" for labels in ("soft", "hard"))
        found |= {soft: Arm({}, share, seeds=1), hard: Arm({"labels": "hard"}, share, against=soft, seeds=1)}
    return found


ARMS = {
    DEFAULT: Arm({}),
    'labels = "hard"': Arm({"labels": "hard"}),
    "margin = 1": Arm({"margin": 1.0}),
    "length_balanced = true": Arm({"length_balanced": True}),
    "mismatched = 0.3": Arm({"mismatched": 0.3}),
    "attacks = 0.3": Arm({"attacks": 0.3}),
    "early_stopping = true": Arm({"early_stopping": True, "checkpoint_every": 10}),
    "rank = 4": Arm({"inputs": [{"rank": 4}]}),
    'pooling = "mean"': Arm({"inputs": [{"pooling": "mean"}]}),
    "members = 3": Arm({"members": 3}, seeds=1),
    "members = 3, bag = 0.7": Arm({"members": 3, "bag": 0.7}, against="members = 3", seeds=1),
    **_flips(),
}


@dataclass
class FewPairs(Context):
    """A context with some of the training pairs of its run, a share of them with the wrong reply chosen."""

    count: int = 0
    flipped: float = 0.0

    def training_pairs(self) -> list[Pair]:
        pairs = super().training_pairs()
        # The same pairs for all seeds.
        random.Random(0).shuffle(pairs)
        return [self._with_label(pair) for pair in pairs[: self.count]]

    def _with_label(self, pair: Pair) -> Pair:
        # One draw per question: the pairs that are flipped at 10% are also flipped at 20%.
        if random.Random(f"{self.config.seed}/{pair.question_id}").random() >= self.flipped:
            return pair
        return replace(
            pair, chosen=pair.rejected, rejected=pair.chosen, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids
        )


# -- training and scores ------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> Path:
    """Make the pairs with the command, or resume; return the folder of the run."""
    run = folder / "run"
    sizes = [value for setting in SIZES for value in ("--set", setting)]
    selfeval("run", "recipes/embedded.toml", "--output", str(run), "--until", "pairs", "--quiet", *sizes)
    return run


def context_of(run: Path, folder: Path, arm: Arm, seed: int, count: int) -> FewPairs:
    """Return a context with the settings of an arm, in a copy of the run."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(run, part)
        part.rename(folder)
    saved = read_json(folder / "run.json")["config"]
    known = {name: value for name, value in saved.items() if name in RunConfig.model_fields and name != "policy"}
    config = RunConfig.model_validate({**known, "seed": seed})
    settings = EvaluatorConfig.model_validate({**config.evaluator.model_dump(), **COMMON, **arm.settings})
    evaluation = config.evaluation.model_copy(update={"attacks": ATTACKED})
    config = config.model_copy(update={"evaluator": settings, "evaluation": evaluation})
    return FewPairs(config, RunStore(folder), Terminal(quiet=True), count=count, flipped=arm.flipped)


def measure(context: FewPairs) -> dict[str, Any]:
    """Train the evaluator and return its result on each test pair and on attacks."""
    counts = evaluator.run(context)
    gold = load_gold(context.config)
    assert gold is not None
    pairs = by_gold(score_pairs(context, _decided(context, gold), _questions(context), right_of=gold_of(gold)))
    attacks = attack_evaluator(context, gold)
    assert attacks is not None
    confidence = [sigmoid(abs(p.pair.margin) / counts["temperature"]) for p in pairs]
    right = [p.evaluator_right for p in pairs]
    return {
        "counts": counts,
        "questions": [p.question_id for p in pairs],
        "right": right,
        # Characters of the better reply less those of the other one.
        "longer": [_sign(len(p.pair.replies[p.better].text) - len(p.pair.replies[1 - p.better].text)) for p in pairs],
        "calibration_error": calibration_error(confidence, right).as_json(),
        "attacks": attacks.total.as_json(),
    }


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _questions(context: Context) -> dict[str, Question]:
    return {q.id: q for q in context.questions(Split.TEST)}


def gold_of(gold: Gold) -> Any:
    return lambda question, replies: (gold.is_right(question, replies[0]), gold.is_right(question, replies[1]))


def _decided(context: Context, gold: Gold) -> list[Verdict]:
    """Return the first test verdicts on pairs with exactly one right reply, whatever the verdict."""
    questions, replies = _questions(context), context.replies()

    def right(verdict: Verdict, reply: str) -> bool | None:
        return gold.is_right(questions[verdict.question_id].text, replies[reply].text)

    judged = [v for v in context.store.read("verdicts", Verdict) if v.question_id in questions]
    return [v for v in judged if right(v, v.first) != right(v, v.second)][:SCORED]


def results_of(run: Path, folder: Path, name: str, seed: int, count: int) -> dict[str, Any]:
    """Return the results of an arm and seed; train and measure it unless that is done."""
    place = folder / f"{list(ARMS).index(name):02d}-seed-{seed}"
    path = place.with_suffix(".json")
    if not path.is_file():
        write_json(path, measure(context_of(run, place, ARMS[name], seed, count)))
        shutil.rmtree(place)
        found = read_json(path)
        print(name, seed, f"right {fmean(found['right']):.4f}", f"attacks {found['attacks']['value']:.4f}", flush=True)
    return dict(read_json(path))


# -- figures ------------------------------------------------------------------------------------------------------------


def _credits(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return for each pair the share of seeds that are right on it."""
    return [fmean(row) for row in zip(*(r["right"] for r in rows), strict=True)]


def figures_of(rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of an arm.

    Args:
        rows: its results, one per seed.
        against: those of the arm that it is compared with, of the same seeds first.
    """
    credits, longer = _credits(rows), rows[0]["longer"]
    of_length = {
        name: mean_figure([credit for credit, sign in zip(credits, longer, strict=True) if sign == wanted]).as_json()
        for name, wanted in (("longer_is_right", 1), ("shorter_is_right", -1))
    }
    return {
        "counts": rows[0]["counts"],
        "accuracy": mean_figure(credits).as_json(),
        "accuracy_seeds": [round(fmean(row["right"]), 6) for row in rows],
        "difference": compare_paired(credits, _credits(against[: len(rows)])).difference.as_json(),
        **of_length,
        "calibration_errors": [row["calibration_error"] for row in rows],
        "attacks": [row["attacks"] for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=180, help="judged training pairs, the held-out ones included")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-evaluator-options"))
    options = parser.parse_args()
    run = prepare(options.folder)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    # Seed by seed, so that a stopped benchmark has complete seeds.
    for seed in options.seeds:
        for name, arm in ARMS.items():
            if seed in options.seeds[: arm.seeds]:
                found[name].append(results_of(run, options.folder, name, seed, options.pairs))
    arms = {}
    for name, arm in ARMS.items():
        arms[name] = {"against": arm.against, **figures_of(found[name], found[arm.against])}
    facts = {"seeds": options.seeds, "pairs": options.pairs, "attacked_questions": ATTACKED}
    command = f"python benchmarks/evaluator_options.py --seeds {' '.join(map(str, options.seeds))}"
    write("evaluator_options", command, {**facts, "arms": arms})


if __name__ == "__main__":
    main()
