"""Measure over-optimisation: one weak evaluator, and ensembles of four.

python benchmarks/overoptimisation.py [--run runs/bench-loop/seed-0] [--pairs 200] [--folder runs/bench-overoptimisation]

Four evaluators are trained on few of the run's pairs, to leave something to exploit. Then (1) best of n on replies of the
initial policy, n = 1 ... 256, and (2) PPO with a very small KL penalty, against one member and against all four, combined by
the mean, the worst case, and the mean minus the variance. Scores are mapped to the scale of gold by a logistic fit on the
initial replies: `expected` is the predicted share of right replies. Curves are fitted as in Gao et al. 2022,
https://arxiv.org/abs/2210.10760.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from common import write
from learning import train_all

from selfeval.backbone.role_files import save_role

MEMBERS = 4
VARIANTS = {
    "one evaluator": ("one", "mean"),
    "mean of four": ("four", "mean"),
    "worst of four": ("four", "worst"),
    "mean less variance": ("four", "uncertainty"),
}
BEST_OF = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def prepare(run: Path, folder: Path, count: int) -> dict[str, Any]:
    """Train the members on `count` pairs and prepare two runs that use them, `one` and `four`; return their accuracy."""
    from selfeval.config import RunConfig
    from selfeval.records import Pair, Split
    from selfeval.runs.reader import pairs_of
    from selfeval.stages.context import Context
    from selfeval.stages.evaluator import preferences
    from selfeval.stages.terminal import Terminal
    from selfeval.store import RunStore, read_json, write_json, write_sealed
    from selfeval.training.checkpoint import Checkpoints
    from selfeval.training.evaluator import score_replies, train_evaluator

    done = folder / "members.json"
    if done.is_file():
        return dict(read_json(done))
    saved = read_json(run / "run.json")
    for name, members in (("one", 1), ("four", MEMBERS)):
        (folder / name / "roles").mkdir(parents=True, exist_ok=True)
        for part in ("questions", "reference_answers", "replies", "pairs"):
            if not (folder / name / part).exists():
                shutil.copytree(run / part, folder / name / part)  # a run folder must not contain links that leave it
        config = saved["config"]
        config["evaluator"] = {**config["evaluator"], "members": members}
        write_sealed(folder / name / "run.json", {**saved, "config": config})
    config = RunConfig.model_validate(
        {
            k: v
            for k, v in read_json(folder / "four" / "run.json")["config"].items()
            if k in RunConfig.model_fields and k != "policy"
        }
    )
    context = Context(config, RunStore(folder / "four"), Terminal(quiet=True))
    pairs, held_out = (context.store.read(pairs_of(split), Pair) for split in (Split.TRAIN, Split.TEST))
    random.Random(0).shuffle(pairs)
    train, test = preferences(context, pairs[:count]), preferences(context, held_out)
    for number in range(MEMBERS):
        role = f"evaluator-{number}"
        context.backbone.roles.add(role, seed=number, head=True)
        train_evaluator(
            context.backbone,
            train,
            config.evaluator,
            lambda optimizers, role=role: Checkpoints(folder / "checkpoints" / role, context.backbone, [role], optimizers),
            seed=number,
            batch_tokens=config.backbone.batch_tokens,
            log=lambda _: None,
            resumed=lambda _: None,
            role=role,
        )
        context.backbone.roles.freeze(role)
        replies = [p.prompt for p in train] * 2, [p.chosen for p in train] + [p.rejected for p in train]
        scores = score_replies(context.backbone, role, *replies, config.backbone.batch_tokens)
        mean = fmean(scores)
        units = {"mean": mean, "deviation": math.sqrt(fmean((s - mean) ** 2 for s in scores)), "temperature": 1.0}
        target = folder / "four" / "roles" / role
        save_role(context.backbone, role, target)
        write_json(target / "evaluator.json", units)
    shutil.copytree(folder / "four" / "roles" / "evaluator-0", folder / "one" / "roles" / "evaluator-0", dirs_exist_ok=True)
    figures = {"pairs": len(train), **_accuracy(context.scorer(), test)}
    write_json(done, figures)
    return figures


def _accuracy(scorer: Any, test: list[Any]) -> dict[str, Any]:
    """Return the held-out accuracy of each member and of their mean, and whether they disagree where they are wrong."""
    from selfeval.quality.statistics import proportion, spearman_figure

    scores_KB = scorer.each([p.prompt for p in test] * 2, [p.chosen for p in test] + [p.rejected for p in test])
    margins_KN = scores_KB[:, : len(test)] - scores_KB[:, len(test) :]
    mean_N, apart_N = margins_KN.mean(0), margins_KN.std(0, correction=0)
    wrong = (mean_N <= 0).tolist()
    return {
        "accuracy_members": [proportion(row).as_json() for row in (margins_KN > 0).tolist()],
        "accuracy_mean": proportion([not w for w in wrong]).as_json(),
        "disagreement_error_correlation": spearman_figure(apart_N.tolist(), [float(w) for w in wrong]).as_json(),
    }


def best_of(folder: Path, questions: int) -> dict[str, Any]:
    """Select the best of n initial replies with each variant."""
    import torch

    from selfeval.backbone.adapters import BASE
    from selfeval.config import RunConfig
    from selfeval.quality.overoptimisation import best_of_n, best_of_n_kl, fit_best_of_n, logistic_fit
    from selfeval.records import Split
    from selfeval.rollout.engine import generate
    from selfeval.rollout.requests import Request
    from selfeval.stages.context import Context
    from selfeval.stages.gold import load_gold
    from selfeval.stages.terminal import Terminal
    from selfeval.store import RunStore, read_json, write_json

    done = folder / "best-of-n.json"
    if done.is_file():
        return dict(read_json(done))
    saved = read_json(folder / "four" / "run.json")["config"]
    config = RunConfig.model_validate({k: v for k, v in saved.items() if k in RunConfig.model_fields and k != "policy"})
    context = Context(config, RunStore(folder / "four"), Terminal(quiet=True))
    gold, asked, most = load_gold(config), context.questions(Split.TEST)[:questions], max(BEST_OF)
    requests = [Request(context.templates.prompt("reply", question=q.text)) for q in asked for _ in range(most)]
    with context.backbone.acting_as(BASE):
        replies = generate(
            context.backbone,
            requests,
            max_new_tokens=context.reply_limit,
            seed=7,
            batch_size=config.backbone.rollout_batch_size,
        )
    texts = [context.templates.text(r.ids) for r in replies]
    right = [bool(gold.is_right(asked[i // most].text, t)) for i, t in enumerate(texts)]  # type: ignore[union-attr]
    prompts = [context.grade_prompt(q.id, q.text) for q in asked for _ in range(most)]
    scores_KB = context.scorer().each(prompts, [r.ids for r in replies])
    figures = {}
    for name, (members, pessimism) in VARIANTS.items():
        some = scores_KB[:1] if members == "one" else scores_KB
        scores = _combined(some, pessimism, torch).tolist()
        a, b = logistic_fit(scores, right)
        expected = [1 / (1 + math.exp(-max(-500.0, min(500.0, a * s + b)))) for s in scores]
        rows = []
        for n in BEST_OF:
            promised, got = [], []
            for q in range(len(asked)):
                part = slice(q * most, (q + 1) * most)
                promised.append(best_of_n(scores[part], expected[part], n))
                got.append(best_of_n(scores[part], [float(x) for x in right[part]], n))
            rows.append({"n": n, "kl": best_of_n_kl(n), "expected": fmean(promised), "gold": fmean(got)})
        distances = [math.sqrt(row["kl"]) for row in rows[1:]]
        fits = {
            key: asdict(fit_best_of_n(distances, [row[key] - rows[0][key] for row in rows[1:]])) for key in ("expected", "gold")
        }
        figures[name] = {"points": rows, "fit": fits}
    write_json(done, figures)
    return figures


def _combined(scores_KB: Any, pessimism: str, torch: Any) -> Any:
    from selfeval.algorithms.ensembles import ensemble_mean, uncertainty_weighted, worst_case

    if pessimism == "worst":
        return worst_case(scores_KB)
    return uncertainty_weighted(scores_KB, weight=0.5) if pessimism == "uncertainty" else ensemble_mean(scores_KB)


def reinforced(folder: Path, iterations: int, workers: int) -> dict[str, Any]:
    """Train PPO against each variant with a very small KL penalty."""
    from selfeval.quality.overoptimisation import fit_reinforcement, logistic_fit

    settings = [
        f"iterations={iterations}", "kl_coefficient=0.001", 'kl_control="fixed"', 'watchdogs="warn"', "learning_rate=2e-3",
        "reward_clip=none",
    ]  # fmt: skip
    jobs = [
        {
            "name": name.replace(" ", "-"),
            "run": str(folder / members),
            "seed": 0,
            "settings": [*settings, f'pessimism="{pessimism}"'],
        }
        for name, (members, pessimism) in VARIANTS.items()
    ]
    figures = {}
    for name, result in zip(VARIANTS, train_all(jobs, folder / "ppo", workers), strict=True):
        if "failed" in result:
            raise SystemExit(f"{name}: the training was stopped ({result['failed']}), so its curve cannot be measured")
        lines = result["iterations"]
        start = [pair for line in lines[:2] for pair in line["replies"]]
        a, b = logistic_fit([s for s, _ in start], [bool(r) for _, r in start])
        rows = [
            {
                "kl": line["kl"],
                "gold": line["gold"],
                "expected": fmean(1 / (1 + math.exp(-max(-500.0, min(500.0, a * s + b)))) for s, _ in line["replies"]),
            }
            for line in lines
        ]
        beyond = [row for row in rows[1:] if row["kl"] > 0]
        distances = [math.sqrt(row["kl"]) for row in beyond]
        fits = {
            key: asdict(fit_reinforcement(distances, [r[key] - rows[0][key] for r in beyond])) for key in ("expected", "gold")
        }
        last = rows[-4:]
        figures[name] = {
            "points": rows,
            "fit": fits,
            "largest_kl": max(row["kl"] for row in rows),
            "gap": fmean(row["expected"] - row["gold"] for row in last),
            "gold_after": result["gold_after"],
            "gold_before": result["gold_before"],
        }
    single = figures["one evaluator"]["gap"]
    for name in figures:
        figures[name]["gap_removed"] = 1 - figures[name]["gap"] / single if single > 0 else None
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/bench-loop/seed-0"))
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-overoptimisation"))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "questions": options.questions,
        "members": prepare(options.run, options.folder, options.pairs),
        "best_of_n": best_of(options.folder, options.questions),
        "ppo": reinforced(options.folder, options.iterations, options.workers),
    }
    print(json.dumps({name: {k: row[k] for k in ("gap", "largest_kl")} for name, row in figures["ppo"].items()}, indent=2))
    write("overoptimisation", "python benchmarks/overoptimisation.py", figures)


if __name__ == "__main__":
    main()
