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

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import VerdictsConfig
from selfeval.judging.judge import Comparison, Judgement, choice, compare
from selfeval.quality.calibration import calibration_error, reliability_bins, risk_coverage
from selfeval.quality.comparisons import Comparison as PairedComparison
from selfeval.quality.comparisons import compare_paired, compare_with_level
from selfeval.quality.length_control import length_controlled_win_rate
from selfeval.quality.overoptimisation import fit_reinforcement, logistic_fit
from selfeval.quality.statistics import (
    Figure,
    clustered_mean,
    mean_figure,
    proportion,
    ratio_of_means,
    spearman_figure,
)
from selfeval.records import Question, Reply, Sampled, Split, Verdict, VerdictState
from selfeval.rollout.engine import Rollout
from selfeval.rollout.guide import Guide
from selfeval.runs.members import temperature_of
from selfeval.stages.context import Context
from selfeval.stages.gold import Gold, load_gold
from selfeval.stages.policy import answer, ensure_policy
from selfeval.stages.verdict_cost import Asked, VerdictCost, measure_cost
from selfeval.store import RunStore, read_json, write_json, writing

__all__ = ["FIRST_PAIRS", "run"]

FIRST_PAIRS = "first_pairs.json"
"""In the stage's folder: on which of round 1's test pairs this round's evaluator is right, by gold and by the judge."""

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

    @property
    def question_id(self) -> str:
        return self.verdict.question_id


def run(context: Context) -> dict[str, Any]:
    """Writes evaluation/figures.json (the figures of report.json that need the model); returns counts."""
    gold = load_gold(context.config.domain, context.config.gold)
    context.load_evaluators()
    guide = ensure_policy(context)
    questions = {q.id: q for q in context.store.read("questions", Question)}
    with context.terminal.bar("evaluation", _passes(context)) as bar:
        evaluator = _evaluator_figures(context, questions, gold, bar.advance)
        policy, samples = _policy_figures(context, guide, gold, bar.advance)
    cost = _verdict_cost(context, questions)
    checked = _checked_samples(context, questions, gold) if gold else {}
    _gold_curve(context, checked)
    policy["overoptimisation"] = _overoptimisation(context, checked)
    figures = {
        "model": _model(context),
        "evaluator": {**evaluator, "cost": cost.tokens if cost else None},
        "verdicts": _verdict_figures(context, questions, gold),
        "policy": policy,
        "samples": samples,
        "memory": _memory(context),
        "seconds_per_verdict": cost.seconds if cost else None,
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
    confidence = [1 / (1 + math.exp(-min(abs(p.margin) / temperature.value, 500.0))) for p in yardstick]
    right = [p.evaluator_right for p in yardstick]
    correct = [float(r) for r in right]
    return {
        "accuracy_gold": proportion([p.evaluator_right for p in by_gold]).as_json() if gold else None,
        "accuracy_judge": proportion([p.evaluator_right for p in by_judge]).as_json(),
        "first_pairs": _on_first_pairs(context, by_gold, by_judge, questions, gold, advance),
        "pairs_trained": context.store.manifest("evaluator")["counts"]["trained"],
        "baselines": {name: rule.as_json() for name, rule in _baselines(yardstick).items()},
        "baselines_on": "gold" if by_gold else "judge",
        "comparisons": _evaluator_comparisons(yardstick, by_judge=not by_gold),
        "ece": calibration_error(confidence, right).as_json(),
        "brier": mean_figure([(sure - c) ** 2 for sure, c in zip(confidence, correct, strict=True)]).as_json(),
        "temperature": round(temperature.value, 6),
        "temperature_pairs": temperature.pairs,
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
        **_gain(context, right, "gold" if gold else "judge"),
    }


def _gain(context: Context, right: Mapping[str, Mapping[str, bool]], labels: str) -> dict[str, Any]:
    """Share of the pairs on which this round's evaluator is right, less that of the evaluator of the round before."""
    if not context.earlier:
        return {"gain": None, "comparison": None}
    before = read_json(context.earlier[-1].folder("evaluation") / FIRST_PAIRS)[labels]
    found = _compare_rights([before[question] for question in right[labels]], list(right[labels].values()))
    return {"gain": found.difference.as_json(), "comparison": found.as_json()}


def _compare_rights(before: Sequence[bool], after: Sequence[bool]) -> PairedComparison:
    """Right or wrong on the same questions, after less before."""
    return compare_paired([float(a) for a in after], [float(b) for b in before])


def _disagreement(pairs: Sequence[_TestPair]) -> dict[str, Any]:
    """Rank correlation of how far the members are apart with being wrong: whether an ensemble knows what it does not know."""
    apart, wrong = [p.apart for p in pairs], [float(not p.evaluator_right) for p in pairs]
    return {"error_correlation": spearman_figure(apart, wrong).as_json()}


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
    scores_KB = context.scorer().each(prompts * 2, ids, advance)
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


def _credits(pairs: Sequence[_TestPair]) -> dict[str, list[float]]:
    """Credit of simple rules, and of the judge (both orders, forced to choose), on each pair; ties count half."""
    rules: dict[str, Callable[[_TestPair], float]] = {
        "longer_wins": lambda p: len(p.replies[0].text) - len(p.replies[1].text),
        "first_wins": lambda p: 1.0,
        "mean_logprob": lambda p: _mean_logprob(p.replies[0]) - _mean_logprob(p.replies[1]),
        "judge": lambda p: (0.5 if p.verdict.probability is None else p.verdict.probability) - 0.5,
    }
    if pairs and all(p.verdict.in_order is None and p.verdict.probability is not None for p in pairs):
        del rules["judge"]  # the labels are those of a file of the user's: no judge was asked
    return {name: [_credit(rule(p), p.better) for p in pairs] for name, rule in rules.items()}


def _baselines(pairs: Sequence[_TestPair]) -> dict[str, Figure]:
    """How often simple rules, and the judge itself, pick the better reply."""
    return {name: mean_figure(credits) for name, credits in _credits(pairs).items()}


def _evaluator_comparisons(pairs: Sequence[_TestPair], *, by_judge: bool) -> dict[str, Any]:
    """The evaluator less each baseline, and less chance, on the same pairs.

    Args:
        by_judge: the labels are the judge's own: it is right by construction, and there is no difference to measure.
    """
    ours, questions = [float(p.evaluator_right) for p in pairs], [p.question_id for p in pairs]
    found: dict[str, Any] = {
        name: compare_paired(ours, theirs, questions).as_json() for name, theirs in _credits(pairs).items()
    }
    if by_judge or "judge" not in found:
        found["judge"] = None
    return {**found, "chance": compare_with_level(ours, 0.5, questions).as_json()}


def _verdict_cost(context: Context, questions: Mapping[str, Question]) -> VerdictCost | None:
    """The cost of a verdict on the test pairs that were judged."""
    replies = context.replies()
    verdicts = [v for v in context.store.read("verdicts", Verdict) if v.split == Split.TEST]
    return measure_cost(context, [Asked(questions[v.question_id], (replies[v.first], replies[v.second])) for v in verdicts])


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
        "source": "file" if context.given and context.given.pairs else "judge",
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
        **_gold_gain(gold, answered, compare_with_level(scores)),
        "kl": mean_figure([a.kl for a in answered], bounds=None).as_json(),
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


def _gold_gain(gold: Gold | None, answered: Sequence[_Answered], wins: PairedComparison) -> dict[str, Any]:
    """Share right after less share right before, over the same questions; and that as a comparison, with the win rate's."""
    if gold is None:
        return {"gold_gain": None, "comparisons": {"gold": None, "win_rate": wins.as_json()}}
    checked = [[gold.is_right(a.question.text, text) for text in (a.before.text, a.after_text)] for a in answered]
    known = [(before, after) for before, after in checked if before is not None and after is not None]
    found = _compare_rights([before for before, _ in known], [after for _, after in known])
    return {
        "gold_gain": found.difference.as_json(),
        "comparisons": {"gold": found.as_json(), "win_rate": wins.as_json()},
    }


def _samples(context: Context, answered: Sequence[_Answered], gold: Gold | None) -> list[dict[str, Any]]:
    """A random few replies side by side (drawn with the run's seed, not picked)."""
    count = min(context.config.evaluation.samples, len(answered))
    picked = context.random("samples").sample(list(answered), count)
    prompts = [context.grade_prompt(a.question.id, a.question.text) for a in picked]
    ids = [a.before.ids for a in picked] + [a.after.ids for a in picked]
    scores = context.scorer().of(prompts * 2, ids).whole_B.tolist() if picked else []
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


@dataclass(frozen=True)
class _CheckedReply:
    """A reply of the training: its question, its chance of being right by its score, and whether gold finds it right."""

    question_id: str
    promised: float
    right: bool


Checked = dict[int, list[_CheckedReply]]
"""By policy iteration."""


def _gold_curve(context: Context, checked: Checked) -> None:
    """metrics/evaluation.jsonl: share of each iteration's replies that gold finds right, and that the evaluator made expect."""
    rows = [
        {"step": step, "gold": round(gold, 6), "expected": round(promised, 6), "n": len(checked[step])}
        for step, (promised, gold) in _shares(checked).items()
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
    found: dict[int, list[tuple[Sampled, bool]]] = {}
    counted = {int(line["step"]) for line in context.store.read_metrics("policy")}
    for sample in context.store.read("policy", Sampled):
        if sample.step not in counted:
            continue
        right = gold.is_right(questions[sample.question_id].text, sample.text)
        if right is not None and len(found.setdefault(sample.step, [])) < context.config.evaluation.gold_replies:
            found[sample.step].append((sample, right))
    found = {step: replies for step, replies in found.items() if replies}
    if not found:
        return {}
    first = found[min(found)]
    a, b = logistic_fit([sample.score for sample, _ in first], [right for _, right in first])
    return {
        step: [_CheckedReply(s.question_id, _sigmoid(a * s.score + b), right) for s, right in replies]
        for step, replies in found.items()
    }


def _shares(checked: Checked) -> dict[int, tuple[float, float]]:
    """By iteration, first to last: the share of right replies that the scores promise, and that by gold."""
    return {
        step: (fmean(reply.promised for reply in replies), fmean(reply.right for reply in replies))
        for step, replies in sorted(checked.items())
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(-500.0, min(x, 500.0))))


def _overoptimisation(context: Context, checked: Checked) -> dict[str, Any] | None:
    """What evaluator and gold gained over the square root of the KL, with the curve of Gao et al. 2022 through each.

    `gap` is what the evaluator promised beyond gold in the last quarter of the iterations; its cases are questions, because an
    iteration has several replies to each and later iterations may ask it again.
    """
    kls = {int(row["step"]): row["kl"] for row in context.store.read_metrics("policy")}
    shares = _shares(checked)
    points = [(math.sqrt(kls[step]), *share) for step, share in shares.items() if (kls.get(step) or 0.0) > 0.0]
    if len({d for d, _, _ in points}) < _FEWEST_POINTS:
        return None
    (start_expected, start_gold), distances = shares[min(shares)], [d for d, _, _ in points]
    fits = {
        "evaluator": fit_reinforcement(distances, [e - start_expected for _, e, _ in points]),
        "gold": fit_reinforcement(distances, [g - start_gold for _, _, g in points]),
    }
    last = [reply for step in sorted(checked)[-max(1, len(checked) // 4) :] for reply in checked[step]]
    gap = clustered_mean([reply.promised - reply.right for reply in last], [reply.question_id for reply in last])
    return {
        "points": [[round(x, 6) for x in point] for point in points],
        "start": [round(start_expected, 6), round(start_gold, 6)],
        "fit": {name: {k: round(v, 6) for k, v in asdict(fit).items()} for name, fit in fits.items()},
        "gap": gap.as_json(),
    }
