"""Process supervision on the embedded model: step labels against gold, and best of n by evaluators of steps and of outcomes.

python benchmarks/steps.py [--seed 0] [--labelled 300] [--train 1000] [--test 300] [--best-of 64]

1. The steps of sampled replies are labelled by k completions, for k = 1, 4 and 16, with the majority's answer or the gold
   answer as the reference, and compared with the exact gold label of each step.
2. Evaluators are trained on the same replies, without gold: of steps, by soft labels of 4 completions; of outcomes, by whether
   a reply has the majority's answer, with the same loss at the last token, and with the Bradley-Terry loss on pairs of replies.
3. Each chooses one of n replies to new questions, and gold counts the right choices.
4. The judge `pointwise` grades the beginning of a reply up to each step, and is compared with gold as the completions are.

`--only judged` measures the last part alone, and adds it to the results.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write

from selfeval.algorithms.step_scores import combined_score
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.config import EvaluatorConfig, StepsConfig, VerdictsConfig
from selfeval.config.load import load_config
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.label_reader import LabelReader, Reading
from selfeval.judging.protocol import JudgeContext
from selfeval.judging.step_labels import SteppedReply, complete_steps, share_of, step_label
from selfeval.judging.steps import step_ends, step_texts
from selfeval.judging.templates import Templates, templates_folder
from selfeval.judging.voting import Ballot, Voter, majority_of
from selfeval.lab.domain import draw_problem
from selfeval.lab.oracle import WordProblems
from selfeval.prompt import Prompt
from selfeval.quality.comparisons import compare_paired
from selfeval.quality.statistics import clustered_mean, mean_figure, proportion
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import Preference, score_replies, train_evaluator
from selfeval.training.step_evaluator import LabelledReply, score_steps, train_step_evaluator

MODEL = Path(__file__).resolve().parents[1] / "src" / "selfeval" / "lab" / "word_problems"
COUNTS = (1, 4, 16)
COMBINATIONS = ("min", "product", "last")
LIMIT = 64
BATCH_TOKENS = 16_384
GOLD = WordProblems()
STEPS = StepsConfig(learning_rate=2e-3, epochs=3, batch=16, completions=4)
OUTCOMES = EvaluatorConfig(learning_rate=2e-3, epochs=3, batch=8)


@dataclass(frozen=True)
class Model:
    """The embedded model, and the seed of everything that it samples."""

    backbone: Backbone
    templates: Templates
    seed: int

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.backbone.loaded.eos_ids

    def decode(self, ids: list[int]) -> str:
        return str(self.templates.tokenizer.decode(ids))

    def voter(self) -> Voter:
        return Voter(self.backbone, self.templates, STEPS, limit=LIMIT, batch_size=512, seed=self.seed)


def questions(count: int, seed: str) -> list[str]:
    """Draw distinct questions."""
    rng, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found[draw_problem(rng).question] = None
    return list(found)


def sampled(model: Model, asked: Sequence[str], count: int, name: str) -> dict[str, list[SteppedReply]]:
    """Sample replies at temperature 1, split into steps; those that were cut off are left out."""
    prompts = {question: model.templates.prompt("reply", question=question) for question in asked}
    requests = [(question, Request(prompts[question])) for question in asked for _ in range(count)]
    seed = random.Random(f"{model.seed}/{name}").getrandbits(32)
    with model.backbone.acting_as(BASE):
        rollouts = generate(model.backbone, [r for _, r in requests], max_new_tokens=LIMIT, seed=seed, batch_size=512)
    found: dict[str, list[SteppedReply]] = {question: [] for question in asked}
    voter = model.voter()
    for (question, request), rollout in zip(requests, rollouts, strict=True):
        if rollout.finished:
            ends = step_ends(rollout.ids, model.decode, STEPS.form, model.end_ids)
            answer = voter.answer(model.decode(list(rollout.ids)), finished=True)
            found[question].append(SteppedReply(question, request.prompt, rollout.ids, ends, answer))
    return found


def majorities(model: Model, asked: Sequence[str]) -> dict[str, str]:
    """Return the majority's answer to each question that has one."""
    ballots = {question: Ballot(model.templates.prompt("reply", question=question)) for question in asked}
    with model.backbone.acting_as(BASE):
        votes = model.voter().hold(ballots, STEPS.votes)
    found = {question: majority_of(votes[question], STEPS.share) for question in asked}
    return {question: answer for question, answer in found.items() if answer is not None}


def grade_prompts(model: Model, asked: Sequence[str]) -> dict[str, Prompt]:
    """Return the prompts of the evaluators, with the model's greedy reply as the reference answer."""
    requests = [Request(model.templates.prompt("reply", question=question), temperature=0.0) for question in asked]
    with model.backbone.acting_as(BASE):
        rollouts = generate(model.backbone, requests, max_new_tokens=LIMIT, seed=0, batch_size=512)
    texts = [model.templates.text(rollout.ids) for rollout in rollouts]
    return {
        question: model.templates.prompt("grade", question=question, reference_answer=text)
        for question, text in zip(asked, texts, strict=True)
    }


# -- labels -------------------------------------------------------------------------------------------------------------


def label_agreement(model: Model, count: int) -> dict[str, Any]:
    """Compare labels by completions with the gold label of every step that completions can label: all but the last."""
    asked = questions(count, f"{model.seed}/labels")
    replies = [reply for found in sampled(model, asked, 2, "labels").values() for reply in found]
    majority = majorities(model, asked)
    with model.backbone.acting_as(BASE):
        answers = complete_steps(model.voter(), replies, max(COUNTS))
    rows: dict[tuple[str, int, str], list[tuple[bool, str]]] = defaultdict(list)
    right = list[bool]()
    for reply, of_reply in zip(replies, answers, strict=True):
        gold = GOLD.right_steps(reply.question, step_texts(reply.ids, reply.ends, model.decode))
        assert gold is not None
        references = {"gold": str(GOLD.answer(reply.question)), "majority": majority.get(reply.question)}
        for truth, completed in list(zip(gold, of_reply, strict=True))[:-1]:
            right.append(truth)
            for name, reference in references.items():
                for k in COUNTS if reference is not None else ():
                    share = share_of(completed[:k], reference)
                    rows[name, k, "soft"].append(((step_label(share, "soft") >= 0.5) == truth, reply.question))
                    rows[name, k, "hard"].append(((step_label(share, "hard") == 1.0) == truth, reply.question))
    correct = [majority[question] == str(GOLD.answer(question)) for question in majority]
    return {
        "questions": count,
        "steps": len(right),
        "steps_right": proportion(right).as_json(),
        "questions_with_majority": len(majority),
        "majority_right": proportion(correct).as_json(),
        "agreement": [
            {"reference": name, "completions": k, "label": kind, **_clustered(found)} for (name, k, kind), found in rows.items()
        ],
    }


def _clustered(found: Sequence[tuple[bool, str]]) -> dict[str, Any]:
    # Steps of replies to one question share their reference, so they are no independent cases.
    figure = clustered_mean([float(agrees) for agrees, _ in found], [question for _, question in found])
    return {"steps": len(found), "agreement": figure.as_json()}


# -- grades of beginnings -----------------------------------------------------------------------------------------------


def judged_steps(model: Model, count: int) -> dict[str, Any]:
    """Let the model grade the beginnings of the replies that `label_agreement` compares, and compare the grades with gold."""
    config = VerdictsConfig(judge="pointwise", reasoning=False)
    tokenizer = model.templates.tokenizer
    templates = Templates.load(templates_folder(str(MODEL)), tokenizer, kinds=kinds_of_run(config))
    rubric = templates.rubric
    assert rubric is not None
    asked = questions(count, f"{model.seed}/labels")
    steps = list[tuple[str, bool]]()
    prompts = list[Prompt]()
    for reply in (reply for found in sampled(model, asked, 2, "labels").values() for reply in found):
        gold = GOLD.right_steps(reply.question, step_texts(reply.ids, reply.ends, model.decode))
        assert gold is not None
        for end, truth in list(zip(reply.ends, gold, strict=True))[:-1]:
            steps.append((reply.question, truth))
            beginning = model.decode(list(reply.ids[:end])).strip()
            shown = {"question": reply.question, "reply": beginning, "cut": True, "reasoning": False, **rubric.shown}
            prompts.append(templates.prompt("pointwise", **shown))
    reader = LabelReader(JudgeContext(model.backbone, templates, ("pointwise",), config, 512), "pointwise")
    with model.backbone.acting_as(BASE):
        readings = reader.read(prompts, None)
    grades = [_grade(reading, rubric.values) for reading in readings]
    found = [(grade, *step) for grade, step in zip(grades, steps, strict=True) if grade is not None]
    return {
        "steps": len(steps),
        "graded": len(found),
        "agreement": _clustered([((grade >= 0.5) == truth, question) for grade, question, truth in found])["agreement"],
        "right_above_wrong": mean_figure(_right_above_wrong(found)).as_json(),
    }


def _grade(reading: Reading, values: Sequence[float]) -> float | None:
    """Return the expected grade, scaled to [0, 1]; None without a grade."""
    if reading.probabilities is None:
        return None
    mean = sum(p * v for p, v in zip(reading.probabilities, values, strict=True)) / sum(reading.probabilities)
    return (mean - min(values)) / (max(values) - min(values))


def _right_above_wrong(found: Sequence[tuple[float, str, bool]]) -> list[float]:
    """Return, for each question, the share of pairs of a right and a wrong step whose right step has the higher grade."""
    by_question: dict[str, dict[bool, list[float]]] = defaultdict(lambda: {True: [], False: []})
    for grade, question, truth in found:
        by_question[question][truth].append(grade)
    shares = list[float]()
    for grades in by_question.values():
        outcomes = [1.0 if a > b else 0.5 if a == b else 0.0 for a in grades[True] for b in grades[False]]
        if outcomes:
            shares.append(sum(outcomes) / len(outcomes))
    return shares


# -- evaluators ---------------------------------------------------------------------------------------------------------


def train_all(model: Model, count: int, folder: Path) -> dict[str, Any]:
    """Train the evaluators on the same replies; return the numbers of what they were trained on."""
    asked = questions(count, f"{model.seed}/train")
    majority, grades = majorities(model, asked), grade_prompts(model, asked)
    replies = [r for found in sampled(model, asked, 2, "train").values() for r in found if r.question in majority]
    with model.backbone.acting_as(BASE):
        answers = complete_steps(model.voter(), replies, STEPS.completions)
    stepped, outcomes = list[LabelledReply](), list[LabelledReply]()
    for reply, of_reply in zip(replies, answers, strict=True):
        prompt, reference = grades[reply.question], majority[reply.question]
        labels = tuple(step_label(share_of(found, reference), STEPS.labels) for found in of_reply)
        stepped.append(LabelledReply(prompt, reply.ids, reply.ends, labels))
        outcomes.append(LabelledReply(prompt, reply.ids, reply.ends[-1:], labels[-1:]))
    pairs = _pairs(replies, grades, majority)
    for role, data in (("steps", stepped), ("outcome", outcomes)):
        _train(model, role, folder, lambda options, data=data: train_step_evaluator(model.backbone, data, STEPS, **options))
    _train(model, "pairs", folder, lambda options: train_evaluator(model.backbone, pairs, OUTCOMES, **options))
    return {
        "questions": count,
        "replies": len(replies),
        "steps": sum(len(reply.ends) for reply in replies),
        "pairs": len(pairs),
        "completions": sum(len(reply.ends) - 1 for reply in replies) * STEPS.completions,
    }


def _pairs(replies: Sequence[SteppedReply], grades: Mapping[str, Prompt], majority: Mapping[str, str]) -> list[Preference]:
    """Return pairs of a reply with the majority's answer and one without."""
    found: dict[str, dict[bool, tuple[int, ...]]] = defaultdict(dict)
    for reply in replies:
        found[reply.question][reply.answer == majority[reply.question]] = reply.ids
    return [Preference(grades[q], both[True], both[False], 0.95) for q, both in found.items() if len(both) == 2]


def _train(model: Model, role: str, folder: Path, train: Callable[[dict[str, Any]], None]) -> None:
    model.backbone.roles.add(role, seed=model.seed, head=True)
    started = time.monotonic()
    losses = list[float]()

    def checkpoints(optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder / role, model.backbone, [role], optimizers)

    options: dict[str, Any] = {"checkpoints": checkpoints, "seed": model.seed, "batch_tokens": BATCH_TOKENS, "role": role}
    train({**options, "log": lambda values: losses.append(values["loss"]), "resumed": lambda step: None})
    model.backbone.roles.freeze(role)
    last = losses[-20:]
    print(f"{role}: {len(losses)} steps, loss {sum(last) / len(last):.3f}, {time.monotonic() - started:.0f} s", flush=True)


# -- best of n ----------------------------------------------------------------------------------------------------------


def best_of_n(model: Model, count: int, n: int) -> dict[str, Any]:
    """Return the share of questions whose chosen reply is right, by each way of choosing, on the same replies."""
    asked = questions(count, f"{model.seed}/test")
    grades, found = grade_prompts(model, asked), sampled(model, asked, n, "test")
    replies = [reply for of_question in found.values() for reply in of_question]
    scores = _scores(model, replies, [grades[reply.question] for reply in replies])
    rights = {id(reply): bool(GOLD.is_right(reply.question, model.templates.text(reply.ids))) for reply in replies}
    numbers = {id(reply): number for number, reply in enumerate(replies)}
    chosen: dict[str, list[bool]] = defaultdict(list)
    for of_question in found.values():
        for name, values in scores.items():
            best = max(of_question, key=lambda reply: values[numbers[id(reply)]], default=None)
            chosen[name].append(best is not None and rights[id(best)])
        chosen["majority"].append(_majority_is_right(of_question, rights))
        chosen["any"].append(any(rights[id(reply)] for reply in of_question))
        chosen["first"].append(bool(of_question) and rights[id(of_question[0])])
    return {
        "questions": count,
        "n": n,
        "right": {name: proportion(outcomes).as_json() for name, outcomes in chosen.items()},
        "steps_min_minus": {
            name: compare_paired(list(map(float, chosen["steps, min"])), list(map(float, outcomes))).difference.as_json()
            for name, outcomes in chosen.items()
            if name not in ("steps, min", "any", "first")
        },
    }


def _scores(model: Model, replies: Sequence[SteppedReply], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
    ids, ends = [reply.ids for reply in replies], [reply.ends for reply in replies]
    logits = score_steps(model.backbone, "steps", prompts, ids, ends, BATCH_TOKENS)
    found = {f"steps, {how}": [float(combined_score(torch.tensor(row), how)) for row in logits] for how in COMBINATIONS}
    for role, name in (("outcome", "outcome"), ("pairs", "outcome, pairs")):
        found[name] = score_replies(model.backbone, role, prompts, ids, BATCH_TOKENS)
    return found


def _majority_is_right(replies: Sequence[SteppedReply], rights: Mapping[int, bool]) -> bool:
    """Return whether the first reply with the most frequent answer is right; of answers as frequent, the first one counts."""
    counts: dict[str, int] = defaultdict(int)
    for reply in replies:
        if reply.answer is not None:
            counts[reply.answer] += 1
    if not counts:
        return False
    most = max(counts, key=lambda answer: counts[answer])
    return next(rights[id(reply)] for reply in replies if reply.answer == most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labelled", type=int, default=300, help="questions whose step labels are compared with gold")
    parser.add_argument("--train", type=int, default=1000, help="questions on whose replies the evaluators are trained")
    parser.add_argument("--test", type=int, default=300, help="questions for best of n")
    parser.add_argument("--best-of", type=int, default=64)
    parser.add_argument("--only", choices=["judged"], help="measure this part alone")
    parser.add_argument("--no-write", action="store_true", help="print the figures instead of writing results/steps.json")
    options = parser.parse_args()
    started = time.process_time()
    backbone = Backbone.load(str(MODEL), load_config(None, {"model": str(MODEL)}, ["backbone.device=cpu"]).backbone)
    model = Model(backbone, Templates.load(templates_folder(str(MODEL)), backbone.loaded.tokenizer), options.seed)
    command = f"python benchmarks/steps.py --seed {options.seed}"

    def record(found: Mapping[str, Any]) -> None:
        """Print what was measured so far, and write it, so that an interrupted benchmark keeps its finished parts."""
        figures = {"seed": options.seed, "cpu_seconds": round(time.process_time() - started), **found}
        print(figures, flush=True)
        if not options.no_write:
            write("steps", command, figures)

    if options.only:
        file = RESULTS / "steps.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        record({**known, "judged": judged_steps(model, options.labelled)})
        return
    labels = label_agreement(model, options.labelled)
    judged = judged_steps(model, options.labelled)
    record({"labels": labels, "judged": judged})
    with tempfile.TemporaryDirectory() as folder:
        trained = train_all(model, options.train, Path(folder))
    record(
        {"labels": labels, "judged": judged, "trained": trained, "best_of_n": best_of_n(model, options.test, options.best_of)}
    )


if __name__ == "__main__":
    main()
