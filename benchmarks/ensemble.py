"""Measure what ensembles of evaluators know about their errors: members that read the same, or different layers and prompts.

python benchmarks/ensemble.py [--questions 34] [--folds 6] [--pairs 200] [--folder runs/bench-ensemble]

Evaluators are trained on few pairs of a run of the embedded model, to leave something to exploit (as in overoptimisation.py),
and score 256 replies of the initial policy to each question. Each arm selects one reply per question. Its promise is the
probability of being right that its score predicts, by a logistic fit on the questions of the other folds, which also choose the
weight and the limit of disagreement; the gap is promise minus gold. All arms have the same base, replies and questions, and
members that are in several ensembles are trained once. A stopped run continues where it stopped.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from common import selfeval, write

from selfeval.algorithms.ensembles import disagreement, ensemble_mean, worst_case
from selfeval.backbone.adapters import BASE
from selfeval.backbone.role_files import save_role
from selfeval.config import RunConfig
from selfeval.config.sections import EvaluatorConfig, MemberInput
from selfeval.prompt import Prompt
from selfeval.quality.answers import answer_of
from selfeval.quality.overoptimisation import logistic_fit
from selfeval.quality.statistics import Figure, bootstrap_interval, mean_figure, proportion, sigmoid, spearman_figure
from selfeval.records import Pair, Question, ReferenceAnswer, Split
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.runs.members import member_roles
from selfeval.runs.reader import pairs_of
from selfeval.stages.context import Context
from selfeval.stages.evaluator import preferences
from selfeval.stages.gold import Gold, load_gold
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, read_json, write_json
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import Preference, score_replies, train_evaluator
from selfeval.training.scoring import without_reference

BEST_OF = 256
REFERENCES = 2
"""Sampled reference answers of the arm whose single evaluator reads several, besides the greedy one."""
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Candidates for the weight of the standard deviation, chosen on the questions of the other folds."""
PLAIN, ALONE = MemberInput(), MemberInput(reference_answer=False)
INPUTS = (PLAIN,) * 4 + (MemberInput(layer=3), MemberInput(layer=2), ALONE, ALONE, MemberInput(layer=3, reference_answer=False))
ENSEMBLES = {"same": (0, 1, 2, 3), "layers": (0, 1, 4, 5), "reference": (0, 1, 6, 7), "both": (0, 4, 6, 8)}
"""Members of each ensemble, by their number in `INPUTS`. Fixed before any of them was measured."""
VARIED = "both"


# -- members and replies ------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> Context:
    """Make the questions, replies and pairs with the command, and return a context whose ensemble has all members."""
    run = folder / "run"
    # Once a member is saved, the command would take it for the work of an unfinished stage.
    if not (run / "roles").is_dir():
        selfeval("run", "recipes/embedded.toml", "--output", str(run), "--until", "pairs", "--quiet")
    saved = read_json(run / "run.json")["config"]
    known = {name: value for name, value in saved.items() if name in RunConfig.model_fields and name != "policy"}
    config = RunConfig.model_validate(known)
    members = EvaluatorConfig.model_validate({**config.evaluator.model_dump(), "members": len(INPUTS), "inputs": INPUTS})
    return Context(config.model_copy(update={"evaluator": members}), RunStore(run), Terminal(quiet=True))


def train_members(context: Context, folder: Path, count: int) -> dict[str, Any]:
    """Train every member on the same `count` pairs unless it is there; return the time and what held-out pairs say."""
    done = folder / "members.json"
    if done.is_file():
        return dict(read_json(done))
    pairs = context.store.read(pairs_of(Split.TRAIN), Pair)
    random.Random(0).shuffle(pairs)
    train, seconds = preferences(context, pairs[:count]), {}
    for number, role in enumerate(member_roles(context.config)):
        if context.role_folder(role).is_dir():
            continue
        started = time.process_time()
        _train(context, number, role, train, folder)
        seconds[role] = round(time.process_time() - started, 1)
    figures = {"pairs": len(train), "seconds": seconds, **held_out(context)}
    write_json(done, figures)
    return figures


def _train(context: Context, number: int, role: str, pairs: Sequence[Preference], folder: Path) -> None:
    config, backbone, read = context.config, context.backbone, INPUTS[number]
    if not read.reference_answer:
        pairs = [replace(pair, prompt=without_reference(pair.prompt)) for pair in pairs]
    backbone.roles.add(role, seed=number, head=True, layer=read.layer)
    train_evaluator(
        backbone,
        pairs,
        config.evaluator,
        lambda optimizers: Checkpoints(folder / "checkpoints" / role, backbone, [role], optimizers),
        seed=number,
        batch_tokens=config.backbone.batch_tokens,
        log=lambda _: None,
        resumed=lambda _: None,
        role=role,
    )
    backbone.roles.freeze(role)
    replies = [p.prompt for p in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = score_replies(backbone, role, *replies, config.backbone.batch_tokens)
    save_role(backbone, role, context.role_folder(role))
    units = {"mean": fmean(scores), "deviation": pstdev(scores), "reference_answer": read.reference_answer}
    write_json(context.role_folder(role) / "evaluator.json", units)


def held_out(context: Context) -> dict[str, Any]:
    """Return how often members and ensembles are right on test pairs with one right reply, and the alarm of each ensemble."""
    gold = gold_of(context)
    texts = {q.id: q.text for q in context.questions(Split.TEST)}
    pairs = [p for p in context.store.read(pairs_of(Split.TEST), Pair) if p.question_id in texts]
    chosen = [bool(gold.is_right(p.prompt, context.templates.text(p.chosen_ids))) for p in pairs]
    rejected = [bool(gold.is_right(p.prompt, context.templates.text(p.rejected_ids))) for p in pairs]
    kept = [(p, a) for p, a, b in zip(pairs, chosen, rejected, strict=True) if a != b]
    found = preferences(context, [p for p, _ in kept])
    scores_KB = context.scorer().each([p.prompt for p in found] * 2, [p.chosen for p in found] + [p.rejected for p in found])
    # Positive where the right reply has the higher score.
    sign_N = torch.tensor([1.0 if right else -1.0 for _, right in kept])
    margins_KN = (scores_KB[:, : len(found)] - scores_KB[:, len(found) :]).cpu() * sign_N
    ensembles = {}
    for name, members in ENSEMBLES.items():
        some_KN = margins_KN[list(members)]
        wrong = (ensemble_mean(some_KN) <= 0).tolist()
        apart = spearman_figure(disagreement(some_KN).tolist(), [float(w) for w in wrong])
        ensembles[name] = {"accuracy": proportion([not w for w in wrong]).as_json(), "disagreement_error": apart.as_json()}
    return {"accuracy_members": [proportion(row).as_json() for row in (margins_KN > 0).tolist()], "held_out": ensembles}


def gold_of(context: Context) -> Gold:
    gold = load_gold(context.config)
    assert gold is not None
    return gold


def sample(context: Context, folder: Path, questions: int) -> list[dict[str, Any]]:
    """Return per question its distinct replies with their number, gold, answer and scores; saved question by question."""
    rows = []
    for number, question in enumerate(context.questions(Split.TEST)[:questions]):
        path = folder / "replies" / f"{number:04d}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, _scored(context, question, number))
        rows.append(dict(read_json(path)))
    return rows


def _scored(context: Context, question: Question, number: int) -> dict[str, Any]:
    replies = _replies(context, question, BEST_OF, seed=number)
    counts = Counter(replies)
    ids = list(counts)
    texts = [context.templates.text(reply) for reply in ids]
    gold, end = gold_of(context), context.backbone.loaded.eos_ids
    prompt = context.grade_prompt(question.id, question.text)
    # Distinct replies are scored once; most of the 256 repeat others.
    scores_KB = context.scorer().each([prompt] * len(ids), ids)
    references = [context.templates.text(r) for r in _replies(context, question, REFERENCES, seed=10_000 + number)]
    by_reference = [_scores_after(context, context.templates.grade_prompt(question.text, text), ids) for text in references]
    (greedy,) = (w.text for w in context.store.read("reference_answers", ReferenceAnswer) if w.question_id == question.id)
    return {
        "counts": [counts[reply] for reply in ids],
        "right": [bool(gold.is_right(question.text, text)) for text in texts],
        "answers": [answer_of(text, "number") if reply[-1] in end else None for reply, text in zip(ids, texts, strict=True)],
        "scores": scores_KB.tolist(),
        "reference_scores": [fmean(row) for row in zip(scores_KB[0].tolist(), *by_reference, strict=True)],
        "reference_right": bool(gold.is_right(question.text, greedy)),
        "reference_answer": answer_of(greedy, "number"),
    }


def _replies(context: Context, question: Question, count: int, seed: int) -> list[tuple[int, ...]]:
    requests = [Request(context.templates.reply_prompt(question))] * count
    batch = context.config.backbone.rollout_batch_size
    with context.backbone.acting_as(BASE):
        found = generate(context.backbone, requests, max_new_tokens=context.reply_limit, seed=seed, batch_size=batch)
    return [rollout.ids for rollout in found]


def _scores_after(context: Context, prompt: Prompt, ids: Sequence[tuple[int, ...]]) -> list[float]:
    """Return the normalised scores of the first member after another grade prompt."""
    member, tokens = context.load_evaluators()[0], context.config.backbone.batch_tokens
    found = score_replies(context.backbone, member.role, [prompt] * len(ids), ids, tokens)
    return [(score - member.mean) / member.deviation for score in found]


# -- arms ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replies:
    """Distinct replies to one question: how often each was sampled, gold, scores [K, N], and the share of its answer."""

    counts: np.ndarray[Any, Any]
    right: np.ndarray[Any, Any]
    scores_KN: torch.Tensor
    after_references: np.ndarray[Any, Any]
    share: np.ndarray[Any, Any]
    follows_reference: np.ndarray[Any, Any]
    reference_right: bool

    @classmethod
    def of(cls, row: dict[str, Any]) -> Replies:
        votes: Counter[str | None] = Counter()
        for answer, count in zip(row["answers"], row["counts"], strict=True):
            votes[answer] += count
        # A reply that was cut off has no answer, so it agrees with none.
        shares = [votes[answer] / BEST_OF if answer is not None else 0.0 for answer in row["answers"]]
        follows = [answer is not None and answer == row["reference_answer"] for answer in row["answers"]]
        return cls(
            np.array(row["counts"]),
            np.array(row["right"]),
            torch.tensor(row["scores"]),
            np.array(row["reference_scores"]),
            np.array(shares),
            np.array(follows),
            row["reference_right"],
        )

    def members(self, name: str) -> torch.Tensor:
        return self.scores_KN[list(ENSEMBLES[name])]

    def mean(self, name: str) -> np.ndarray[Any, Any]:
        return ensemble_mean(self.members(name)).numpy()

    def apart(self, name: str) -> np.ndarray[Any, Any]:
        return disagreement(self.members(name)).numpy()


Score = Callable[[Replies], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Selected:
    """The selection of an arm per question: gold and promise, each the mean over replies with the same highest score."""

    gold: np.ndarray[Any, Any]
    promise: np.ndarray[Any, Any]

    @property
    def gap(self) -> np.ndarray[Any, Any]:
        return self.promise - self.gold


def fit(score: Score, replies: Sequence[Replies]) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Return the probability of being right that a score predicts, fitted on all sampled replies to these questions."""
    flat = np.concatenate([np.repeat(score(r), r.counts) for r in replies])
    right = np.concatenate([np.repeat(r.right, r.counts) for r in replies])
    # -inf marks replies that an arm does not select.
    known = np.isfinite(flat)
    slope, offset = logistic_fit(flat[known].tolist(), right[known].tolist())
    return lambda scores: sigmoid(slope * np.where(np.isfinite(scores), scores, 0.0) + offset)


def best(values: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> float:
    """Return the mean value of the replies with the highest score."""
    top = scores == scores.max()
    return float(np.average(values[top], weights=counts[top]))


def select(score: Score, calibration: Sequence[Replies], replies: Sequence[Replies]) -> Selected:
    chance = fit(score, calibration)
    scored = [score(r) for r in replies]
    gold = [best(r.right.astype(float), s, r.counts) for r, s in zip(replies, scored, strict=True)]
    promise = [best(chance(s), s, r.counts) for r, s in zip(replies, scored, strict=True)]
    return Selected(np.array(gold), np.array(promise))


def penalised(name: str, weight: float) -> Score:
    return lambda r: r.mean(name) - weight * r.apart(name)


def chosen_weight(name: str, calibration: Sequence[Replies]) -> float:
    """Return the weight of the standard deviation with the most right replies to the other questions."""
    return max(WEIGHTS, key=lambda weight: float(select(penalised(name, weight), calibration, calibration).gold.mean()))


def agreeing(name: str, calibration: Sequence[Replies]) -> Score:
    """Select among replies on which the members disagree at most as on half of all replies to the other questions."""
    limit = float(np.median(np.concatenate([np.repeat(r.apart(name), r.counts) for r in calibration])))

    def score(r: Replies) -> np.ndarray[Any, Any]:
        agreed = r.apart(name) <= limit
        return np.where(agreed, r.mean(name), -np.inf) if agreed.any() else r.mean(name)

    return score


def vote_and_evaluator(name: str, calibration: Sequence[Replies]) -> Score:
    """Multiply the probability of being right by the evaluators with the share of the replies that have the same answer."""
    chance = fit(lambda r: r.mean(name), calibration)
    return lambda r: chance(r.mean(name)) * r.share


def arms(calibration: Sequence[Replies]) -> dict[str, Score]:
    """Return the score of each arm."""
    weights = {name: chosen_weight(name, calibration) for name in ("same", VARIED)}
    found: dict[str, Score] = {"one evaluator": lambda r: r.scores_KN[0].numpy()}
    for name in ENSEMBLES:
        found[f"mean, {name}"] = lambda r, name=name: r.mean(name)  # type: ignore[misc]
    for name in ("same", VARIED):
        found[f"lowest, {name}"] = lambda r, name=name: worst_case(r.members(name)).numpy()  # type: ignore[misc]
        found[f"mean less deviation, {name}"] = penalised(name, weights[name])
        found[f"where members agree, {name}"] = agreeing(name, calibration)
    found["one evaluator, three references"] = lambda r: r.after_references
    found["vote"] = lambda r: r.share
    for name in ("same", VARIED):
        found[f"vote times evaluator, {name}"] = vote_and_evaluator(name, calibration)
    return found


def cross_fitted(replies: Sequence[Replies], folds: int) -> dict[str, Selected]:
    """Return the selections of each arm, with everything that is fitted for a question fitted on those of the other folds."""
    parts: dict[str, list[Selected]] = defaultdict(list)
    for fold in range(folds):
        others = [r for i, r in enumerate(replies) if i % folds != fold]
        for name, score in arms(others).items():
            parts[name].append(select(score, others, replies[fold::folds]))
    return {
        name: Selected(np.concatenate([s.gold for s in found]), np.concatenate([s.promise for s in found]))
        for name, found in parts.items()
    }


# -- figures ------------------------------------------------------------------------------------------------------------


def compare(one: Selected, other: Selected) -> dict[str, Any]:
    """Return the figures of an arm, with the differences to one evaluator paired by question."""

    def closed(cases: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return 1 - other.gap[cases].mean(1) / one.gap[cases].mean(1)

    low, high = bootstrap_interval(closed, len(one.gap))
    whole = Figure(float(1 - other.gap.mean() / one.gap.mean()), low, high, len(one.gap))
    return {
        "gold": mean_figure(other.gold.tolist()).as_json(),
        "promised": mean_figure(other.promise.tolist()).as_json(),
        "gap": mean_figure(other.gap.tolist(), bounds=None).as_json(),
        "gap_closed": whole.as_json(),
        "gold_more": mean_figure((other.gold - one.gold).tolist(), bounds=None).as_json(),
    }


def cause(replies: Sequence[Replies]) -> dict[str, Any]:
    """Return how the selections of one evaluator are related to the greedy reply that it reads as the reference answer."""
    rows = [(r.right[i], r.follows_reference[i], r.reference_right) for r in replies for i in [int(r.scores_KN[0].argmax())]]
    wrong = [bool(follows) for right, follows, _ in rows if not right]
    return {
        "reference_right": proportion([r.reference_right for r in replies]).as_json(),
        "selected_follow_reference": proportion([bool(follows) for _, follows, _ in rows]).as_json(),
        "wrong_follow_reference": proportion(wrong).as_json(),
        "right_where_reference_is_wrong": proportion([bool(right) for right, _, good in rows if not good]).as_json(),
    }


def alarms(replies: Sequence[Replies]) -> dict[str, Any]:
    """Return whether signals on the selected reply predict that it is wrong: rank correlation, and gold of the surer half."""
    found = {}
    for name in ("same", "layers", "reference", "both"):
        picks = [int(r.mean(name).argmax()) for r in replies]
        right = [bool(r.right[i]) for r, i in zip(replies, picks, strict=True)]
        signals = {
            "disagreement": [float(r.apart(name)[i]) for r, i in zip(replies, picks, strict=True)],
            "1 - vote": [float(1 - r.share[i]) for r, i in zip(replies, picks, strict=True)],
        }
        for signal, values in signals.items():
            surer = np.argsort(values, kind="stable")[: len(values) // 2]
            found[f"{signal}, {name}"] = {
                "error_correlation": spearman_figure(values, [float(not x) for x in right]).as_json(),
                "gold_of_surer_half": proportion([right[i] for i in surer]).as_json(),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=34, help="questions with 256 replies")
    parser.add_argument("--folds", type=int, default=6, help="parts of the questions, for fits on other questions")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-ensemble"))
    options = parser.parse_args()
    context = prepare(options.folder)
    members = train_members(context, options.folder, options.pairs)
    replies = [Replies.of(row) for row in sample(context, options.folder, options.questions)]
    selected = cross_fitted(replies, options.folds)
    figures = {
        "questions": len(replies),
        "folds": options.folds,
        "best_of": BEST_OF,
        "inputs": [read.model_dump() for read in INPUTS],
        "ensembles": ENSEMBLES,
        "members": members,
        "arms": {name: compare(selected["one evaluator"], one) for name, one in selected.items()},
        "right_replies": mean_figure([float(np.average(r.right, weights=r.counts)) for r in replies]).as_json(),
        "with_right_reply": proportion([bool(r.right.any()) for r in replies]).as_json(),
        "cause": cause(replies),
        "alarms": alarms(replies),
    }
    write("ensemble", "python benchmarks/ensemble.py", figures)


if __name__ == "__main__":
    main()
