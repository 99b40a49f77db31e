"""The judges of the embedded model on the same pairs, against gold: sampled votes, agreement and combined judges.

python benchmarks/judges.py [--pairs 400] [--seed 0] [--judges pairwise combined]

Draws questions of the domain, samples two replies to each at temperature 1, and keeps the pairs with exactly one right reply.
Each judge compares the same pairs with the settings of the recipe. The embedded model has no prompt of `pointwise`. Gold is
read by no judge. The accuracies of a combined judge are estimated from its votes on these pairs, as in a run.
"""

from __future__ import annotations

import argparse
import random
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import write

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.config.load import load_config
from selfeval.judge_benchmark.figures import Case, credit_of, measure
from selfeval.judge_benchmark.judging import Outcome
from selfeval.judge_benchmark.pairs import LabelledPair, in_random_order
from selfeval.judging.judges import make_judge
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.protocol import Comparison
from selfeval.judging.templates import Templates, templates_folder
from selfeval.lab.domain import draw_problem
from selfeval.lab.oracle import WordProblems
from selfeval.quality.calibration import calibration_error
from selfeval.quality.comparisons import compare_paired
from selfeval.records import CombinedEvidence, Verdict
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "embedded.toml"
COMBINED = ("verdicts.judge=combined", 'verdicts.combined.judges=["pairwise", "agreement"]')
PLAIN = "pairwise"
JUDGES: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    "pairwise, 4 votes": ("verdicts.votes=4",),
    "pairwise, 16 votes": ("verdicts.votes=16",),
    "agreement, 16 votes": ("verdicts.judge=agreement", "verdicts.max_new_tokens=64"),
    "combined": (*COMBINED, "verdicts.max_new_tokens=64"),
    "combined, 4 votes": (*COMBINED, "verdicts.max_new_tokens=64", "verdicts.votes=4"),
}
"""Judges and settings. A vote of `agreement` is a reply, so it has the limit of one."""


def config_of(*settings: str) -> RunConfig:
    """Return the recipe with some settings."""
    return load_config(RECIPE, {}, ["backbone.device=cpu", *settings])


def drawn_pairs(backbone: Backbone, templates: Templates, count: int, seed: int) -> list[LabelledPair]:
    """Sample replies until there are enough pairs with exactly one right reply."""
    rng, gold, found, asked = random.Random(f"{seed}/judges"), WordProblems(), list[LabelledPair](), set[str]()
    while len(found) < count:
        questions = [question for _ in range(256) if (question := draw_problem(rng).question) not in asked]
        asked |= set(questions)
        for question, replies in sampled(backbone, templates, questions, rng.getrandbits(32)).items():
            right = [gold.is_right(question, reply) for reply in replies]
            if sorted(right, key=bool) == [False, True]:
                chosen = replies[right.index(True)]
                found.append(in_random_order(question, chosen, replies[right.index(False)]))
    return found[:count]


def sampled(backbone: Backbone, templates: Templates, questions: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Sample two replies to each question; those that were cut off are left out."""
    requests = [Request(templates.prompt("reply", question=question)) for question in questions for _ in range(2)]
    with backbone.acting_as(BASE):
        rollouts = generate(backbone, requests, max_new_tokens=64, seed=seed, batch_size=512)
    found: dict[str, list[str]] = {question: [] for question in questions}
    for number, rollout in enumerate(rollouts):
        if rollout.finished:
            found[questions[number // 2]].append(templates.text(rollout.reply_ids))
    return found


def judged(backbone: Backbone, templates: Templates, config: RunConfig, pairs: Sequence[LabelledPair]) -> list[Case]:
    """Judge the pairs."""
    judge = make_judge(backbone, templates, config.verdicts, batch_size=config.backbone.rollout_batch_size)
    with backbone.acting_as(BASE):
        found = judge.judge([Comparison(pair.question, pair.first, pair.second) for pair in pairs])
    return [Case(pair, Outcome(one).verdict(config.verdicts)) for pair, one in zip(pairs, found, strict=True)]


def credits_of(cases: Sequence[Case]) -> list[float]:
    """Return 1 for each pair whose right reply is preferred, 0 for the other one, and one half without a preference."""
    return [credit_of((case.verdict.probability or 0.5) - 0.5, case.pair.label) for case in cases]


def figures(cases: Sequence[Case], plain: Sequence[Case]) -> dict[str, Any]:
    """Return the figures of a judge, and its accuracy less that of plain `pairwise` on the same pairs."""
    measured, credits = measure(cases), credits_of(cases)
    chosen = [(case.verdict.confidence, credit == 1) for case, credit in zip(cases, credits, strict=True) if credit != 0.5]
    return {
        **measured.scores.as_json(),
        "ece": calibration_error([c for c, _ in chosen], [right for _, right in chosen]).as_json(),
        "aurc": None if measured.aurc is None else round(measured.aurc, 6),
        "less_plain": compare_paired(credits, credits_of(plain)).as_json(),
        "accuracies": _accuracies(cases[0].verdict),
    }


def _accuracies(verdict: Verdict) -> dict[str, float] | None:
    """Return the estimated accuracies of the members of a combined judge."""
    evidence = verdict.evidence
    if not isinstance(evidence, CombinedEvidence):
        return None
    return {name: round(value, 4) for name, value in zip(evidence.judges, evidence.accuracies, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES), help="`pairwise` is always among them")
    options = parser.parse_args()
    # The first one is that with which the others are compared.
    configs = {name: config_of(*settings) for name, settings in JUDGES.items() if name in (PLAIN, *options.judges)}
    model = configs[PLAIN].model
    backbone = Backbone.load(model, configs[PLAIN].backbone)
    kinds = tuple(dict.fromkeys(kind for config in configs.values() for kind in kinds_of_run(config.verdicts)))
    templates = Templates.load(templates_folder(model), backbone.loaded.tokenizer, kinds=kinds)
    pairs = drawn_pairs(backbone, templates, options.pairs, options.seed)
    rows, plain = {}, list[Case]()
    for name, config in configs.items():
        begun = time.process_time()
        cases = judged(backbone, templates, config, pairs)
        plain = plain or cases
        rows[name] = {**figures(cases, plain), "cpu_seconds": round(time.process_time() - begun, 1)}
        print(name, rows[name], flush=True)
    named = "" if len(rows) == len(JUDGES) else f" --judges {shlex.join(rows)}"
    command = f"python benchmarks/judges.py --pairs {options.pairs}{named}"
    keep = configs[PLAIN].verdicts.keep
    write("judges", command, {"pairs": len(pairs), "seed": options.seed, "keep": keep, "judges": rows})


if __name__ == "__main__":
    main()
