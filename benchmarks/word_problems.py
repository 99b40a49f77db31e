"""The loop on a real model without a judge that can judge: word problems, labelled by a vote on the answer.

python benchmarks/word_problems.py [--model FOLDER] [--seeds 1 2 3] [--output runs/bench-word-problems]

Questions of one operation (shared/data/math, next to the repository) with whole numbers below 100, split into training and test
questions without near-duplicates. By recipes/small-model.toml, the judge `agreement` labels pairs of replies to the training
questions, and `dpo` trains on the kept pairs with the loss `orpo`. Base and policy then answer the test questions, greedily and
with samples; the same questions and random numbers, so all differences are paired. Answers of the problems are read by the
measurement alone.

A rerun of the command resumes: every seed is a run, and finished measurements are kept in its folder. The default model is
the one of real_model.py.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import random
import re
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, machine, selfeval
from real_model import model_folder

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "math" / "singleop.jsonl.xz"
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "small-model.toml"
EVALUATION_TEMPERATURE, SAMPLES, LIMIT = 0.8, 8, 20


# -- questions ----------------------------------------------------------------------------------------------------------


def questions_of(train: int, test: int) -> tuple[list[str], list[str]]:
    """Return training and test questions, the same for every seed; no test question has a near-duplicate in training."""
    from selfeval.quality.dedupe import NearDuplicates

    texts = [row["input"].strip() for row in _rows()]
    small = sorted({text for text in texts if _is_small(text)})
    random.Random("word problems").shuffle(small)
    held_out, seen = small[:test], NearDuplicates()
    for text in held_out:
        seen.add(text, text)
    rest = [text for text in small[test:] if seen.find(text) is None]
    if len(held_out) < test or len(rest) < train:
        raise SystemExit(f"there are {len(rest)} training questions after {len(held_out)} test questions; ask for fewer")
    return rest[:train], held_out


def _is_small(text: str) -> bool:
    """Return whether a question has at least two numbers, all of them whole and below 100. The answer is not looked at."""
    numbers = re.findall(r"\d[\d.,]*\d|\d", text)
    return len(numbers) >= 2 and all(number.isdigit() and len(number) <= 2 for number in numbers)


def _rows() -> Iterable[dict[str, Any]]:
    with lzma.open(DATA, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def gold() -> dict[str, str]:
    """Return the answer of each question. Only `measure` calls this."""
    return {row["input"].strip(): f"{row['target']:g}" for row in _rows()}


# -- the run ------------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, seed: int) -> float:
    """Run the stages up to the policy, or resume them. Return the seconds of the stages, of all calls together."""
    output = options.output / f"seed-{seed}"
    questions, held_out = questions_of(options.train, options.test)
    file = options.output / "questions.jsonl"
    # Four test questions, because every run needs some; the others are asked by `measure` alone.
    rows = [{"question": q, "split": "train"} for q in questions] + [{"question": q, "split": "test"} for q in held_out[:4]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = (f"verdicts.agreement.votes={options.votes}", f"questions.file={file.resolve()}", f"seed={seed}", *options.set)
    more = [part for setting in settings for part in ("--set", setting)]
    selfeval("run", str(RECIPE), "--model", options.model, "--output", str(output), "--until", "policy", "--quiet", *more)
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return float(sum(stage.get("seconds") or 0 for stage in run["stages"].values()))


# -- the measurement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Credits of the replies to the test questions: 1 for a finished reply with the right answer, else 0.

    Attributes:
        greedy: one per question.
        sampled: `SAMPLES` per question, question by question.
        finished: share of the sampled replies that ended by themselves.
        agreement: mean share of the most frequent answer among the samples of a question.
    """

    greedy: list[float]
    sampled: list[float]
    finished: float
    agreement: float


def measure(options: argparse.Namespace, seed: int, seconds: float) -> dict[str, Any]:
    """Return the figures of a seed: base and policy on the test questions, and the votes on the training questions."""
    answers, (_, held_out) = gold(), questions_of(options.train, options.test)
    base, policy = _both(options, seed, held_out, answers)
    figures = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "votes": _votes(options.output / f"seed-{seed}", answers),
        "base": vars(base),
        "policy": vars(policy),
        "greedy": _compared(policy.greedy, base.greedy, held_out),
        "sampled": _compared(policy.sampled, base.sampled, [q for q in held_out for _ in range(SAMPLES)]),
    }
    return figures


def figures_of(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the figures of a seed; of one that is not finished, train and measure first."""
    path = options.output / f"seed-{seed}.json"
    if not path.is_file():
        started = time.monotonic()
        figures = measure(options, seed, train(options, seed))
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(figures) + "\n", encoding="utf-8")
        part.rename(path)
        print(f"seed {seed}: {time.monotonic() - started:.0f} s in this call", flush=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _both(
    options: argparse.Namespace, seed: int, held_out: Sequence[str], answers: Mapping[str, str]
) -> tuple[Answers, Answers]:
    """Answer the test questions with the base and with the policy, from the same random numbers."""
    from selfeval.backbone.adapters import BASE
    from selfeval.backbone.role_files import load_role
    from selfeval.backbone.roles import Backbone
    from selfeval.config.load import config_of_run
    from selfeval.judging.templates import Templates
    from selfeval.training.context import POLICY

    folder = options.output / f"seed-{seed}"
    file = folder / "run.json"
    config = config_of_run(json.loads(file.read_text(encoding="utf-8"))["config"], file)
    backbone = Backbone.load(config.model, config.backbone)
    load_role(backbone, POLICY, folder / "roles" / POLICY)
    own = Templates.load(Path(config.templates), backbone.loaded.tokenizer)
    base, policy = (_answers(backbone, own, role, seed, held_out, answers) for role in (BASE, POLICY))
    return base, policy


def _answers(backbone: Any, own: Any, role: str, seed: int, held_out: Sequence[str], answers: Mapping[str, str]) -> Answers:
    from collections import Counter

    from selfeval.quality.answers import answer_of, is_answer
    from selfeval.rollout.engine import generate
    from selfeval.rollout.requests import Request

    temperatures = (0.0, *[EVALUATION_TEMPERATURE] * SAMPLES)
    requests = [Request(own.prompt("reply", question=q), t) for q in held_out for t in temperatures]
    with backbone.acting_as(role):
        rollouts = generate(backbone, requests, max_new_tokens=LIMIT, seed=seed, batch_size=200)
    texts, ends = [own.text(r.ids) for r in rollouts], [r.finished for r in rollouts]
    asked = [q for q in held_out for _ in temperatures]
    credits = [float(f and is_answer(t, [answers[q]])) for q, t, f in zip(asked, texts, ends, strict=True)]
    width = len(temperatures)
    sampled = [i for i in range(len(requests)) if i % width]
    shares = []
    for start in range(0, len(requests), width):
        found = Counter(answer_of(texts[i], "number") for i in range(start + 1, start + width) if ends[i])
        shares.append(max((n for answer, n in found.items() if answer is not None), default=0) / SAMPLES)
    return Answers(
        credits[::width],
        [credits[i] for i in sampled],
        sum(ends[i] for i in sampled) / len(sampled),
        sum(shares) / len(shares),
    )


def _compared(ours: Sequence[float], theirs: Sequence[float], questions: Sequence[str]) -> dict[str, Any]:
    """Return both accuracies and their paired difference, clustered by question."""
    from selfeval.quality.comparisons import compare_paired
    from selfeval.quality.statistics import clustered_mean

    return {
        "base": clustered_mean(list(theirs), list(questions)).as_json(),
        "policy": clustered_mean(list(ours), list(questions)).as_json(),
        "policy_less_base": compare_paired(ours, theirs, questions).as_json(),
    }


def _votes(folder: Path, answers: Mapping[str, str]) -> dict[str, Any]:
    """Return how often the majority's answer is right, and how often a kept pair prefers a right reply to a wrong one."""
    from selfeval.quality.answers import is_answer
    from selfeval.quality.statistics import proportion
    from selfeval.records import AgreementEvidence, VerdictState
    from selfeval.runs.reader import RunReader

    reader = RunReader(folder)
    questions = {question.id: question.text for question in reader.records("questions")}
    states: dict[str, int] = {}
    every, clear, single, chosen, rejected = [], [], [], [], []
    for verdict in reader.records("verdicts"):
        states[verdict.state.value] = states.get(verdict.state.value, 0) + 1
        evidence, truth = verdict.evidence, answers[questions[verdict.question_id]]
        if not isinstance(evidence, AgreementEvidence) or not evidence.votes:
            continue
        right = [is_answer(answer, [truth]) for answer in evidence.votes]
        every.append(right[0])
        single.append(
            sum(n for n, is_right in zip(evidence.votes.values(), right, strict=True) if is_right) / len(evidence.causes)
        )
        if verdict.probability != 0.5 or verdict.tie:
            clear.append(right[0])
        if verdict.state == VerdictState.KEPT and verdict.probability is not None:
            credits = [answer is not None and is_answer(answer, [truth]) for answer in evidence.answers]
            better = 0 if verdict.probability > 0.5 else 1
            chosen.append(credits[better])
            rejected.append(credits[1 - better])
    return {
        "states": states,
        "single_vote_right": _mean(single),
        "majority_right": proportion(every).as_json(),
        "clear_majority_right": proportion(clear).as_json(),
        "chosen_right": proportion(chosen).as_json(),
        "rejected_right": proportion(rejected).as_json(),
    }


def _mean(values: Sequence[float]) -> dict[str, Any]:
    from selfeval.quality.statistics import mean_figure

    return mean_figure(values).as_json()


def pooled(runs: Sequence[Mapping[str, Any]], held_out: Sequence[str]) -> dict[str, Any]:
    """Return the differences over all seeds; replies of several seeds to one question are one cluster."""
    found = {}
    for way, times in (("greedy", 1), ("sampled", SAMPLES)):
        asked = [q for q in held_out for _ in range(times)] * len(runs)
        ours, theirs = ([credit for run in runs for credit in run[who][way]] for who in ("policy", "base"))
        found[way] = _compared(ours, theirs, asked)
    return found


def recipe_settings() -> list[str]:
    """Return the settings of the recipe as of `--set`."""

    def flat(values: Mapping[str, Any], before: str = "") -> Iterable[str]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{before}{name}.")
            else:
                yield f"{before}{name}={json.dumps(value)}"

    return list(flat(tomllib.loads(RECIPE.read_text(encoding="utf-8"))))


def report(options: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the results of the finished seeds, without the credits of single replies."""
    _, held_out = questions_of(options.train, options.test)
    shown = [
        {**run, **{who: {k: round(v, 4) for k, v in run[who].items() if isinstance(v, float)} for who in ("base", "policy")}}
        for run in runs
    ]
    figures = {
        "command": f"python benchmarks/word_problems.py --seeds {' '.join(str(run['seed']) for run in runs)}",
        "machine": machine(),
        "model": Path(options.model).name,
        "data": "singleop, whole numbers below 100",
        "questions": {"train": options.train, "test": options.test},
        "votes": options.votes,
        "evaluation": {"temperature": EVALUATION_TEMPERATURE, "samples": SAMPLES},
        "settings": [*recipe_settings(), *options.set],
        "pooled": pooled(runs, held_out),
        "runs": shown,
    }
    options.results.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.results}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="another model folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs/bench-word-problems"), help="folder of the runs")
    parser.add_argument("--train", type=int, default=300, help="training questions")
    parser.add_argument("--test", type=int, default=120, help="test questions")
    parser.add_argument("--votes", type=int, default=8, help="votes per training question")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS / "real_model_word_problems.json", help="file of the results")
    options = parser.parse_args()
    options.model = options.model or str(model_folder())
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        runs.append(figures_of(options, seed))
        report(options, runs)


if __name__ == "__main__":
    main()
