"""evaluation: the evidence. The evaluator against its baselines on unfiltered test pairs; the policy before and after.

This is the only stage that may look at gold. Nothing here is read by a training stage.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import VerdictsConfig
from selfeval.judging.judge import Comparison, Judgement, choice, compare
from selfeval.quality.calibration import brier_score, expected_calibration_error, reliability_bins, risk_coverage
from selfeval.quality.length_control import length_controlled_win_rate
from selfeval.quality.overoptimisation import fit_reinforcement, logistic_fit
from selfeval.quality.statistics import (
    Figure,
    bootstrap_interval,
    mean_figure,
    paired_difference,
    proportion,
    ratio_of_means,
    spearman_figure,
)
from selfeval.records import Question, Reply, Split, Verdict, VerdictState
from selfeval.rollout.engine import Rollout
from selfeval.rollout.guide import Guide
from selfeval.stages.context import Context
from selfeval.stages.evaluators import ensure_evaluators, scorer_of, temperature_of
from selfeval.stages.gold import Gold, load_gold
from selfeval.stages.policy import Sampled, answer, ensure_policy
from selfeval.store import RunStore, read_json, write_json, writing

__all__ = ["FIRST_PAIRS", "run"]

FIRST_PAIRS = "first_pairs.json"
"""In the stage's folder: on which of round 1's test pairs this round's evaluator is right, by gold and by the judge."""

_CALIBRATION_RESAMPLES = 500
_FEWEST_POINTS = 4
"""Iterations that a curve with two coefficients needs."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _TestPair:
    """A judged test pair with what every way of choosing says: True when it prefers the better reply.

    Attributes:
        better: which reply is better by the yardstick (gold, or the sure judge): 0 or 1.
        margin: evaluator score of reply 0 minus that of reply 1.
        apart: deviation of the margin over the members of an ensemble, 0 for one evaluator.
    """

    verdict: Verdict
    replies: tuple[Reply, Reply]
    better: int
    margin: float
    apart: float

    @property
    def evaluator_right(self) -> bool:
        return self.margin != 0 and (self.margin > 0) == (self.better == 0)


def run(context: Context) -> dict[str, Any]:
    """Writes evaluation/figures.json (the figures of report.json that need the model); returns counts."""
    gold = load_gold(context.config.domain, context.config.gold)
    ensure_evaluators(context)
    guide = ensure_policy(context)
    questions = {q.id: q for q in context.store.read("questions", Question)}
    with context.terminal.bar("evaluation", _passes(context)) as bar:
        evaluator = _evaluator_figures(context, questions, gold, bar.advance)
        policy, samples = _policy_figures(context, guide, gold, bar.advance)
    checked = _checked_samples(context, questions, gold) if gold else {}
    _gold_curve(context, checked)
    policy["overoptimisation"] = _overoptimisation(context, checked)
    figures = {
        "model": _model(context),
        "evaluator": evaluator,
        "verdicts": _verdict_figures(context, questions, gold),
        "policy": policy,
        "samples": samples,
        "memory": _memory(context),
    }
    write_json(context.store.folder("evaluation") / "figures.json", figures)
    return {"pairs": evaluator["accuracy_judge"]["n"], "questions": policy["win_rate"]["n"]}


def _passes(context: Context) -> int:
    """Units of the progress bar: two scores a test pair; a reply and two comparisons an evaluated question."""
    scored = [context.store, context.first] if context.earlier else [context.store]
    pairs = sum(v.split == Split.TEST for store in scored for v in store.read("verdicts", Verdict))
    asked = min(context.config.evaluation.questions, len(context.questions(Split.TEST)))
    return 2 * pairs + 3 * asked


def _model(context: Context) -> dict[str, Any]:
    backbone = context.backbone
    return {
        "name": backbone.source,
        "model_type": backbone.model.config.model_type,
        "parameters": backbone.parameter_count,
        "precision": backbone.loaded.precision,
        "domain": context.config.domain,
        "gold_file": context.config.gold or None,
    }


def _memory(context: Context) -> dict[str, Any]:
    """Bytes of the base, and of all adapters and heads at the end of policy training (as counted there)."""
    trained = context.store.manifest("policy")["counts"]
    return {"base_bytes": context.backbone.base_bytes, **{key: trained[key] for key in ("adapter_bytes", "weight_copies")}}


# -- the evaluator ------------------------------------------------------------------------------------------------------


def _evaluator_figures(
    context: Context, questions: Mapping[str, Question], gold: Gold | None, advance: Advance
) -> dict[str, Any]:
    pairs = _judged_test_pairs(context, questions, advance)
    by_gold = _by_gold(pairs, questions, gold) if gold else []
    by_judge = [p for p in pairs if p.verdict.state == VerdictState.KEPT]
    yardstick = by_gold or by_judge
    temperature = temperature_of(context.store.root / "roles")
    confidence = [1 / (1 + math.exp(-min(abs(p.margin) / temperature, 500.0))) for p in yardstick]
    correct = [float(p.evaluator_right) for p in yardstick]
    return {
        "accuracy_gold": proportion([p.evaluator_right for p in by_gold]).as_json() if gold else None,
        "accuracy_judge": proportion([p.evaluator_right for p in by_judge]).as_json(),
        "first_pairs": _on_first_pairs(context, by_gold, by_judge, questions, gold, advance),
        "pairs_trained": context.store.manifest("evaluator")["counts"]["trained"],
        "baselines": {name: rule.as_json() for name, rule in _baselines(yardstick, _is_judged(context)).items()},
        "baselines_on": "gold" if by_gold else "judge",
        "ece": _resampled(expected_calibration_error, confidence, correct),
        "brier": _resampled(brier_score, confidence, correct),
        "temperature": round(temperature, 6),
        "members": context.config.evaluator.members,
        "disagreement": _disagreement(yardstick) if context.config.evaluator.members > 1 else None,
        "risk_coverage": [[round(c, 6), round(r, 6)] for c, r in risk_coverage(confidence, correct)] if correct else [],
        "calibration": [
            {"confidence": round(c, 6), "accuracy": round(a, 6), "n": n} for c, a, n in reliability_bins(confidence, correct)
        ],
    }


def _on_first_pairs(
    context: Context,
    by_gold: Sequence[_TestPair],
    by_judge: Sequence[_TestPair],
    questions: Mapping[str, Question],
    gold: Gold | None,
    advance: Advance,
) -> dict[str, Any]:
    """The evaluator on round 1's test pairs, the one set on which the evaluators of all rounds can be compared.

    `gain` is its accuracy there less that of the round before, on the same pairs: by gold, or by the judge without gold.

    Args:
        by_gold, by_judge: the pairs of this round, which in round 1 are that set.
    """
    if context.earlier:
        pairs = _judged_test_pairs(context, questions, advance, context.first)
        by_gold = _by_gold(pairs, questions, gold) if gold else []
        by_judge = [p for p in pairs if p.verdict.state == VerdictState.KEPT]
    right = {
        name: {p.verdict.question_id: p.evaluator_right for p in of} for name, of in (("gold", by_gold), ("judge", by_judge))
    }
    write_json(context.store.folder("evaluation") / FIRST_PAIRS, right)
    return {
        "accuracy_gold": proportion(list(right["gold"].values())).as_json() if gold else None,
        "accuracy_judge": proportion(list(right["judge"].values())).as_json(),
        "gain": _gain(context, right, "gold" if gold else "judge"),
    }


def _gain(context: Context, right: Mapping[str, Mapping[str, bool]], labels: str) -> dict[str, Any] | None:
    """Share of the pairs on which this round's evaluator is right, less that of the evaluator of the round before."""
    if not context.earlier:
        return None
    before = read_json(context.earlier[-1].folder("evaluation") / FIRST_PAIRS)[labels]
    return paired_difference([before[question] for question in right[labels]], list(right[labels].values())).as_json()


def _disagreement(pairs: Sequence[_TestPair]) -> dict[str, Any]:
    """Rank correlation of how far the members are apart with being wrong: whether an ensemble knows what it does not know."""
    apart, wrong = [p.apart for p in pairs], [float(not p.evaluator_right) for p in pairs]
    return {"error_correlation": spearman_figure(apart, wrong).as_json()}


def _resampled(
    measure: Callable[[Sequence[float], Sequence[float]], float | None], confidence: list[float], correct: list[float]
) -> dict[str, Any]:
    """A calibration measure with its basic bootstrap interval (Davison and Hinkley 1997, section 5.2).

    Resampling adds noise to every bin, which such measures count as miscalibration: the percentile interval would lie too
    high, and is reflected at the measured value instead.
    """
    value, count = measure(confidence, correct), len(correct)
    rows = np.array([confidence, correct])

    def statistic(index_RN: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        return np.array([measure(*rows[:, index].tolist()) for index in index_RN], dtype=np.float64)

    low, high = bootstrap_interval(statistic, count, resamples=_CALIBRATION_RESAMPLES) if count else (None, None)
    if value is None or low is None or high is None:
        return Figure(value, None, None, count).as_json()
    return Figure(value, max(0.0, min(value, 2 * value - high)), min(1.0, max(value, 2 * value - low)), count).as_json()


def _judged_test_pairs(
    context: Context, questions: Mapping[str, Question], advance: Advance | None = None, store: RunStore | None = None
) -> list[_TestPair]:
    """Every judged pair of a test question, whatever its verdict, with the evaluator's margin and the judge's choice.

    Args:
        store: the round whose pairs they are; this one unless given.
    """
    replies = context.replies(store)
    verdicts = [v for v in (store or context.store).read("verdicts", Verdict) if v.split == Split.TEST]
    both = [(replies[v.first], replies[v.second]) for v in verdicts]
    prompts = [context.grade_prompt(v.question_id, questions[v.question_id].text) for v in verdicts]
    ids = [a.ids for a, _ in both] + [b.ids for _, b in both]
    scores_KB = scorer_of(context).each(prompts * 2, ids, advance)
    margins_KN = scores_KB[:, : len(both)] - scores_KB[:, len(both) :]
    margins, apart = margins_KN.mean(0).tolist(), margins_KN.std(0, correction=0).tolist()
    preferred = [1 if v.probability is not None and v.probability < 0.5 else 0 for v in verdicts]
    return [_TestPair(*row) for row in zip(verdicts, both, preferred, margins, apart, strict=True)]


def _by_gold(pairs: Sequence[_TestPair], questions: Mapping[str, Question], gold: Gold) -> list[_TestPair]:
    """The pairs with exactly one right reply, unfiltered by anything the judge said; gold says which is better."""
    found = []
    for pair in pairs:
        text = questions[pair.verdict.question_id].text
        right = [gold.is_right(text, reply.text) for reply in pair.replies]
        if None not in right and right[0] != right[1]:
            found.append(replace(pair, better=0 if right[0] else 1))
    return found


def _is_judged(context: Context) -> bool:
    """Whether a judge gave the verdicts, not the user with a file of pairs."""
    return not (context.given and context.given.pairs)


def _baselines(pairs: Sequence[_TestPair], judged: bool) -> dict[str, Figure]:
    """How often simple rules, and the judge itself (both orders, forced to choose), pick the better reply; ties count half.

    Args:
        pairs: with the reply that is better.
        judged: whether a judge was asked about them.
    """
    rules: dict[str, Callable[[_TestPair], float]] = {
        "longer_wins": lambda p: len(p.replies[0].text) - len(p.replies[1].text),
        "first_wins": lambda p: 1.0,
        "mean_logprob": lambda p: _mean_logprob(p.replies[0]) - _mean_logprob(p.replies[1]),
        "judge": lambda p: (0.5 if p.verdict.probability is None else p.verdict.probability) - 0.5,
    }
    if not judged:
        del rules["judge"]
    return {name: mean_figure([_credit(rule(p), p.better) for p in pairs]) for name, rule in rules.items()}


def _mean_logprob(reply: Reply) -> float:
    return reply.logprob / max(1, len(reply.ids))


def _credit(preference: float, better: int) -> float:
    return 0.5 if preference == 0 else float((preference > 0) == (better == 0))


# -- the verdicts -------------------------------------------------------------------------------------------------------


def _verdict_figures(context: Context, questions: Mapping[str, Question], gold: Gold | None) -> dict[str, Any]:
    verdicts, replies = context.store.read("verdicts", Verdict), context.replies()
    states = Counter(v.state.value for v in verdicts)
    kept = [v for v in verdicts if v.state == VerdictState.KEPT]
    labels = [_label_is_right(v, replies, questions, gold) for v in kept] if gold else []
    return {
        "judged": len(verdicts),
        "source": "judge" if _is_judged(context) else "file",
        **{state.value: states.get(state.value, 0) for state in VerdictState},
        "kept_share": proportion([v.state == VerdictState.KEPT for v in verdicts]).as_json(),
        "swap_consistency": proportion([x for v in verdicts if (x := _is_consistent(v)) is not None]).as_json(),
        "label_accuracy_gold": proportion([x for x in labels if x is not None]).as_json() if gold else None,
    }


def _is_consistent(verdict: Verdict) -> bool | None:
    """Whether both orders chose the same of first, second and neither; None where one did not parse.

    Of two choices only, a sure tie would toss a coin for each order: it lies about one half, a hair above or below.
    """
    choices = [
        choice(better, tie)
        for better, tie in zip((verdict.in_order, verdict.swapped), verdict.ties, strict=True)
        if better is not None and tie is not None
    ]
    return choices[0] == choices[1] if len(choices) == 2 else None


def _label_is_right(
    verdict: Verdict, replies: Mapping[str, Reply], questions: Mapping[str, Question], gold: Gold
) -> bool | None:
    """Whether a kept label chose a right reply over a wrong one; None where the question has no gold."""
    text = questions[verdict.question_id].text
    first, second = (gold.is_right(text, replies[r].text) for r in (verdict.first, verdict.second))
    if first is None or second is None or verdict.probability is None:
        return None
    return first and not second if verdict.probability >= 0.5 else second and not first


# -- the policy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answered:
    """A test question with the reply before and after, and how they compare."""

    question: Question
    before: Reply
    after: Rollout
    after_text: str
    kl: float
    judgement: Judgement


def _policy_figures(
    context: Context, guide: Guide | None, gold: Gold | None, advance: Advance
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    answered = _answer_and_judge(context, guide, advance)
    outcomes = [_outcome(a.judgement, context.config.verdicts) for a in answered]
    decided = [(o, a) for o, a in zip(outcomes, answered, strict=True) if o is not None]
    scores = [o for o, _ in decided]
    lengths = [float(len(a.after.ids) - len(a.before.ids)) for _, a in decided]
    counts = Counter({1.0: "win", 0.5: "tie", 0.0: "loss"}[o] for o in scores)
    figures = {
        "win_rate": mean_figure(scores).as_json(),
        "win_rate_decisive": proportion([o == 1.0 for o in scores if o != 0.5]).as_json(),
        "length_controlled": length_controlled_win_rate(scores, lengths).as_json(),
        **{name: counts.get(name, 0) for name in ("win", "tie", "loss")},
        "unparsable": len(answered) - len(decided),
        "gold_before": _gold_share(gold, [(a.question.text, a.before.text) for a in answered]),
        "gold_after": _gold_share(gold, [(a.question.text, a.after_text) for a in answered]),
        "gold_gain": _gold_gain(gold, answered),
        "kl": mean_figure([a.kl for a in answered]).as_json(),
        "length_ratio": ratio_of_means([len(a.after.ids) for a in answered], [len(a.before.ids) for a in answered]).as_json(),
        "watchdogs": context.store.read_metrics("watchdogs"),
    }
    return figures, _samples(context, answered, gold)


def _answer_and_judge(context: Context, guide: Guide | None, advance: Advance | None = None) -> list[_Answered]:
    config, backbone, templates = context.config, context.backbone, context.templates
    questions = context.questions(Split.TEST)[: config.evaluation.questions]
    replies = context.replies()
    before = [replies[f"{q.id}-r0"] for q in questions]
    prompts = [templates.prompt("reply", question=q.text) for q in questions]
    after = answer(context, prompts, guide, seed=context.seed("evaluation"), advance=advance)
    texts = [templates.text(r.ids) for r in after]
    kls = _kl_to_start(context, prompts, after)
    with backbone.acting_as(BASE):
        judgements = compare(
            backbone,
            templates,
            "referee",
            [Comparison(q.text, t, b.text) for q, t, b in zip(questions, texts, before, strict=True)],
            config.verdicts,
            rows=config.rollout_rows,
            advance=advance,
        )
    return [_Answered(*row) for row in zip(questions, before, after, texts, kls, judgements, strict=True)]


def _kl_to_start(context: Context, prompts: Sequence[tuple[int, ...]], rollouts: Sequence[Rollout]) -> list[float]:
    """Per reply: sum over its tokens of log-prob under the policy minus log-prob under the start, in nats."""
    ids = [r.ids for r in rollouts]
    with context.backbone.acting_as(context.ensure_start()):
        start = reply_logprobs(context.backbone, prompts, ids, batch_tokens=context.config.batch_tokens)
    return [sum(r.logprobs) - sum(s) for r, s in zip(rollouts, start, strict=True)]


def _outcome(judgement: Judgement, config: VerdictsConfig) -> float | None:
    """1 when the policy's reply won in the average of both orders, 0 when it lost, None when unparsable.

    0.5, a tie: the judge named one, the orders disagree, or they balance exactly.
    """
    if judgement.probability is None or judgement.in_order is None or judgement.swapped is None or judgement.tie is None:
        return None
    orders = {(p > 0.5) - (p < 0.5) for p in (judgement.in_order, judgement.swapped)}
    if judgement.tie > config.tie or len(orders) > 1 or orders == {0}:
        return 0.5
    return float(judgement.probability > 0.5)


def _gold_share(gold: Gold | None, answers: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    if gold is None:
        return None
    checked = [gold.is_right(question, reply) for question, reply in answers]
    return proportion([c for c in checked if c is not None]).as_json()


def _gold_gain(gold: Gold | None, answered: Sequence[_Answered]) -> dict[str, Any] | None:
    """Share right after less share right before, over the same questions."""
    if gold is None:
        return None
    checked = [[gold.is_right(a.question.text, text) for text in (a.before.text, a.after_text)] for a in answered]
    known = [(before, after) for before, after in checked if before is not None and after is not None]
    return paired_difference([before for before, _ in known], [after for _, after in known]).as_json()


def _samples(context: Context, answered: Sequence[_Answered], gold: Gold | None) -> list[dict[str, Any]]:
    """A random few replies side by side (drawn with the run's seed, not picked)."""
    count = min(context.config.evaluation.samples, len(answered))
    picked = context.random("samples").sample(list(answered), count)
    prompts = [context.grade_prompt(a.question.id, a.question.text) for a in picked]
    ids = [a.before.ids for a in picked] + [a.after.ids for a in picked]
    scores = scorer_of(context).of(prompts * 2, ids).whole_B.tolist() if picked else []
    return [
        {
            "question": a.question.text,
            "before": a.before.text,
            "after": a.after_text,
            "gold_before": gold.is_right(a.question.text, a.before.text) if gold else None,
            "gold_after": gold.is_right(a.question.text, a.after_text) if gold else None,
            "evaluator_before": round(scores[i], 4),
            "evaluator_after": round(scores[i + count], 4),
            "verdict": {1.0: "win", 0.5: "tie", 0.0: "loss", None: "unparsable"}[
                _outcome(a.judgement, context.config.verdicts)
            ],
        }
        for i, a in enumerate(picked)
    ]


Checked = dict[int, list[tuple[float, bool]]]
"""By policy iteration, of each reply: the chance of being right that its score made expect, and whether gold finds it right."""


def _gold_curve(context: Context, checked: Checked) -> None:
    """metrics/evaluation.jsonl: share of each iteration's replies that gold finds right, and that the evaluator made expect."""
    rows = [
        {"step": step, "gold": round(fmean(r for _, r in replies), 6), "expected": round(fmean(e for e, _ in replies), 6)}
        | {"n": len(replies)}
        for step, replies in sorted(checked.items())
    ]
    if not rows:
        return
    with writing(context.store.metrics_path("evaluation")) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for row in rows:
        context.trackers.log("evaluation", row)


def _checked_samples(context: Context, questions: Mapping[str, Question], gold: Gold) -> Checked:
    """The first replies of each iteration whose question has gold; iterations that were given up are left out.

    Score is turned into chance by what the first iteration shows, where the policy has not yet learnt to please the evaluator.
    """
    scored: dict[int, list[tuple[float, bool]]] = {}
    counted = {int(line["step"]) for line in context.store.read_metrics("policy")}
    for sample in context.store.read("policy", Sampled):
        if sample.step not in counted:
            continue
        right = gold.is_right(questions[sample.question_id].text, sample.text)
        if right is not None and len(scored.setdefault(sample.step, [])) < context.config.evaluation.gold_replies:
            scored[sample.step].append((sample.score, right))
    scored = {step: replies for step, replies in scored.items() if replies}
    if not scored:
        return {}
    first = scored[min(scored)]
    a, b = logistic_fit([score for score, _ in first], [right for _, right in first])
    return {step: [(_sigmoid(a * s + b), right) for s, right in replies] for step, replies in scored.items()}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, min(x, 500.0))))


def _overoptimisation(context: Context, checked: Checked) -> dict[str, Any] | None:
    """What evaluator and gold gained over the square root of the KL, with the curve of Gao et al. 2022 through each.

    `gap` is what the evaluator promised beyond gold in the last quarter of the iterations.
    """
    kls = {int(row["step"]): row["kl"] for row in context.store.read_metrics("policy")}
    shares = {step: (fmean(e for e, _ in replies), fmean(r for _, r in replies)) for step, replies in sorted(checked.items())}
    points = [(math.sqrt(kls[step]), *share) for step, share in shares.items() if (kls.get(step) or 0.0) > 0.0]
    if len({d for d, _, _ in points}) < _FEWEST_POINTS:
        return None
    (start_expected, start_gold), distances = shares[min(shares)], [d for d, _, _ in points]
    fits = {
        "evaluator": fit_reinforcement(distances, [e - start_expected for _, e, _ in points]),
        "gold": fit_reinforcement(distances, [g - start_gold for _, _, g in points]),
    }
    last = sorted(checked)[-max(1, len(checked) // 4) :]
    return {
        "points": [[round(x, 6) for x in point] for point in points],
        "start": [round(start_expected, 6), round(start_gold, 6)],
        "fit": {name: {k: round(v, 6) for k, v in asdict(fit).items()} for name, fit in fits.items()},
        "gap": mean_figure([e - r for step in last for e, r in checked[step]]).as_json(),
    }
