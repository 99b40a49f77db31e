"""evaluation: the evidence. The evaluator against its baselines on unfiltered test pairs; the policy before and after training.

This is the only stage that may read gold, and no training stage reads its output. This module collects the inputs of the
figures (scores, replies, judgements, gold answers); `selfeval.evaluation` computes the figures from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from selfeval.errors import MissingPackageError
from selfeval.evaluation.domain_map import QuestionResults, results_of
from selfeval.evaluation.evaluator import (
    EvaluatorFacts,
    JudgedPair,
    Rights,
    measure_evaluator,
    measure_first_pairs,
    rights_of,
)
from selfeval.evaluation.judge_probe import PROBED, diagnose
from selfeval.evaluation.ngram_baseline import with_surprise
from selfeval.evaluation.over_optimisation import (
    CheckedReply,
    PredictedReply,
    measure_over_optimisation,
    predict,
    shares_of,
)
from selfeval.evaluation.policy import Answered, measure_policy, outcome, sample_of
from selfeval.evaluation.reference_scores import score_by_references
from selfeval.evaluation.replies import measure_replies
from selfeval.evaluation.verdicts import label_is_right, measure_verdicts
from selfeval.judging.calibrated import calibration_of
from selfeval.judging.protocol import Comparison
from selfeval.records import ComparedReplies, Question, Reply, Sampled, ScoredPair, Split, Verdict, VerdictState
from selfeval.report.schema import (
    Alarm,
    Attacks,
    Evaluation,
    EvaluationMemory,
    Evaluator,
    FirstPairs,
    Model,
    OverOptimisation,
    ReferenceScores,
    Replies,
    Sample,
    TokensPerVerdict,
    UnitTests,
    Verdicts,
)
from selfeval.runs.members import confidence_of, temperature_of
from selfeval.stages.attacks import attack_evaluator, most_attacks
from selfeval.stages.context import Context
from selfeval.stages.evaluation_work import Score, answered_by_policy, judged_by_referee, scores_of
from selfeval.stages.gold import Gold, ask_ahead, count_outcomes, gold_file, load_gold, right_steps_of
from selfeval.stages.held_out import score_pairs
from selfeval.stages.policy import ensure_policy
from selfeval.stages.replies import texts_of_training_questions
from selfeval.stages.seed_references import compare_seed_replies, seed_passes
from selfeval.stages.step_evidence import evaluate_steps
from selfeval.stages.terminal import Bar
from selfeval.stages.vectors import embed_replies, map_of_domain
from selfeval.stages.verdict_cost import Asked, VerdictCost, measure_cost
from selfeval.store import RunStore, read_object

__all__ = ["COMPARED", "FIRST_PAIRS", "SCORED", "run"]

SCORED, COMPARED = "evaluation/scored.jsonl", "evaluation/compared.jsonl"
"""Files of records: the judged test pairs with the evaluator's margins, and the replies before and after training."""

FIRST_PAIRS = "first_pairs.json"
"""File in the stage's folder: on which of round 1's test pairs this round's evaluator is right, by gold and by the judge."""


def run(context: Context) -> dict[str, Any]:
    """Write evaluation/figures.json (the parts of report.json that need the model), and return counts."""
    gold = load_gold(context.config, allow_code_execution=context.allow_code_execution)
    context.load_evaluators()
    # All roles are loaded before the first measurement, so the timing of verdicts below includes no loading.
    guide = ensure_policy(context)
    questions = {q.id: q for q in context.store.read("questions", Question)}
    with context.terminal.bar("evaluation", _passes(context)) as bar:
        score = scores_of(context, bar)
        pairs = _judged_test_pairs(context, questions, gold, score)
        pairs = with_surprise(pairs, questions, context.replies().values())
        first_pairs = _first_pairs(context, pairs, questions, gold, score)
        answered, rows = _answer_and_judge(context, gold, bar)
        scores = _scores_of_replies(context, rows, score)
        attacks = attack_evaluator(context, gold, score)
        of_seeds = compare_seed_replies(context, guide, bar.advance)
        steps = evaluate_steps(context, questions, pairs, right_steps_of(gold), has_gold=gold is not None)
    cost = _verdict_cost(context, questions)
    predicted = predict(_checked_replies(context, questions, gold)) if gold else {}
    _write_gold_curve(context, predicted)
    vectors = embed_replies(context, [a.before for a in answered], [a.after for a in answered])
    figures = Evaluation(
        model=_model(context),
        evaluator=_evaluator(context, pairs, first_pairs, cost.tokens if cost else None, attacks, has_gold=gold is not None),
        verdicts=_verdicts(context, questions, gold),
        policy=measure_policy(
            *(answered, _alarms(context), _over_optimisation(context, predicted)), has_gold=gold is not None, vectors=vectors
        ).model_copy(update={"references": _references(context, answered, rows), "seed_references": of_seeds}),
        # After all replies were checked by gold, because it counts the results of the unit tests.
        replies=_replies(context, answered, questions.values()).model_copy(update={"unit_tests": _unit_tests(gold)}),
        samples=tuple(_samples(context, answered, scores)),
        memory=_memory(context),
        seconds_per_verdict=cost.seconds if cost else None,
        steps=steps,
        domain_map=map_of_domain(context, questions.values(), _results(context, pairs)),
    )
    context.store.write_records(SCORED, [_scored(pair) for pair in pairs])
    context.store.write_records(COMPARED, [_compared(*row) for row in zip(rows, answered, scores, strict=True)])
    context.store.write_json(context.store.folder("evaluation") / "figures.json", figures.as_json())
    return {"pairs": figures.evaluator.accuracy_judge.n, "questions": figures.policy.win_rate.n}


def _passes(context: Context) -> int:
    """Return the length of the progress bar: two scores per test pair, one reply, two comparisons and two scores per evaluated
    question, one score per attack reply, and the replies to seeds."""
    # A later round scores its own test pairs and those of round 1.
    scored = [context.store, context.first] if context.earlier else [context.store]
    pairs = sum(v.split == Split.TEST for store in scored for v in store.read("verdicts", Verdict))
    asked = min(context.config.evaluation.questions, len(context.questions(Split.TEST)))
    return 2 * pairs + 5 * asked + most_attacks(context) + seed_passes(context)


def _model(context: Context) -> Model:
    backbone = context.backbone
    return Model(
        name=backbone.source,
        model_type=backbone.model.config.model_type,
        parameters=backbone.census.parameter_count,
        precision=backbone.loaded.precision,
        domain=context.config.domain,
        gold_file=gold_file(context.config) or None,
    )


def _memory(context: Context) -> EvaluationMemory:
    """Return the bytes of the base, and of all adapters and heads as counted at the end of policy training."""
    # This process may have loaded fewer adapters than the training had, so its own count would be too low.
    trained = context.store.manifest("policy")["counts"]
    return EvaluationMemory(
        base_bytes=context.backbone.census.base_bytes,
        adapter_bytes=trained["adapter_bytes"],
        weight_copies=trained["weight_copies"],
        shared_prompts=trained.get("shared_prompts"),
    )


def _both_right(gold: Gold | None, question: str, replies: tuple[str, str]) -> tuple[bool | None, bool | None] | None:
    """Return whether each reply is right by gold; None without gold."""
    return None if gold is None else (gold.is_right(question, replies[0]), gold.is_right(question, replies[1]))


def _ask_ahead_of_pairs(
    gold: Gold | None, verdicts: Sequence[Verdict], questions: Mapping[str, Question], replies: Mapping[str, Reply]
) -> None:
    ask_ahead(gold, [(questions[v.question_id].text, replies[r].text) for v in verdicts for r in (v.first, v.second)])


# -- the evaluator ------------------------------------------------------------------------------------------------------


def _evaluator(
    context: Context,
    pairs: Sequence[JudgedPair],
    first_pairs: FirstPairs,
    cost: TokensPerVerdict | None,
    attacks: Attacks | None,
    *,
    has_gold: bool,
) -> Evaluator:
    temperature = temperature_of(context.store.root / "roles")
    facts = EvaluatorFacts(
        temperature=temperature.value,
        temperature_pairs=temperature.pairs,
        pairs_trained=context.store.manifest("evaluator")["counts"]["trained"],
        members=context.config.evaluator.members,
        labels_from_file=_labels_from_file(context),
        confidence=confidence_of(context.store.root / "roles"),
    )
    return measure_evaluator(pairs, facts, first_pairs, cost, attacks, has_gold=has_gold)


def _judged_test_pairs(
    context: Context,
    questions: Mapping[str, Question],
    gold: Gold | None,
    score: Score,
    store: RunStore | None = None,
) -> list[JudgedPair]:
    """Return every judged pair of a test question, whatever its verdict, with the evaluator's margin and the gold answers.

    Args:
        context: context of the round.
        questions: questions by id.
        gold: Optional. Gold oracle of the domain.
        score: scores replies with the evaluators of the round.
        store: Optional. Folder of the round whose pairs are read. Default: this round.
    """
    verdicts = [v for v in (store or context.store).read("verdicts", Verdict) if v.split == Split.TEST]
    _ask_ahead_of_pairs(gold, verdicts, questions, context.replies(store))
    right_of = partial(_both_right, gold)
    return score_pairs(context, verdicts, questions, right_of=right_of, score=score, store=store)


def _first_pairs(
    context: Context,
    pairs: Sequence[JudgedPair],
    questions: Mapping[str, Question],
    gold: Gold | None,
    score: Score,
) -> FirstPairs:
    """Evaluate on round 1's test pairs, the one set on which the evaluators of all rounds can be compared.

    Args:
        context: context of the round.
        pairs: the pairs of this round; in round 1, they are that set.
        questions: questions by id.
        gold: Optional. Gold oracle of the domain.
        score: scores replies with the evaluators of the round.
    """
    before = None
    if context.earlier:
        pairs = _judged_test_pairs(context, questions, gold, score, context.first)
        saved = read_object(context.earlier[-1].folder("evaluation") / FIRST_PAIRS, "gold", "judge")
        before = Rights(saved["gold"], saved["judge"])
    now = rights_of(pairs)
    context.store.write_json(context.store.folder("evaluation") / FIRST_PAIRS, {"gold": now.gold, "judge": now.judge})
    return measure_first_pairs(now, before, has_gold=gold is not None)


def _verdict_cost(context: Context, questions: Mapping[str, Question]) -> VerdictCost | None:
    """Measure the cost of a verdict on the judged test pairs."""
    replies = context.replies()
    verdicts = [v for v in context.store.read("verdicts", Verdict) if v.split == Split.TEST]
    return measure_cost(context, [Asked(questions[v.question_id], (replies[v.first], replies[v.second])) for v in verdicts])


# -- the verdicts -------------------------------------------------------------------------------------------------------


def _verdicts(context: Context, questions: Mapping[str, Question], gold: Gold | None) -> Verdicts:
    verdicts, replies = context.store.read("verdicts", Verdict), context.replies()
    _ask_ahead_of_pairs(gold, [v for v in verdicts if v.state == VerdictState.KEPT], questions, replies)
    labels = [
        label_is_right(v, right)
        for v in verdicts
        if v.state == VerdictState.KEPT
        and (right := _both_right(gold, questions[v.question_id].text, (replies[v.first].text, replies[v.second].text)))
    ]
    from_file = _labels_from_file(context)
    # The probed pairs, whose verdicts are in the first shards.
    probe = diagnose(verdicts[:PROBED], context.config) if len(verdicts) > PROBED and not from_file else None
    calibration = None if from_file else calibration_of(context.config.verdicts, context.judge_fit())
    return measure_verdicts(verdicts, labels if gold else None, from_file=from_file, probe=probe, calibration=calibration)


def _labels_from_file(context: Context) -> bool:
    return bool(context.given and context.given.pairs)


# -- the policy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A test question, its reply before training, the token ids of the reply after it, and the referee's probability."""

    question: Question
    before: Reply
    after_ids: tuple[int, ...]
    probability: float | None


def _answer_and_judge(context: Context, gold: Gold | None, bar: Bar) -> tuple[list[Answered], list[_Row]]:
    """Answer the test questions with the trained policy, and compare each reply with the start role's first reply."""
    config = context.config
    questions = context.questions(Split.TEST)[: config.evaluation.questions]
    replies = context.replies()
    # Samples of the start role at the same temperature (stages/replies.py), so a new sample is not needed.
    before = [replies[f"{q.id}-r0"] for q in questions]
    after = answered_by_policy(context, questions, bar)
    comparisons = [
        Comparison(q.text, a.text, b.text, not a.finished, not b.finished, q.messages)
        for q, a, b in zip(questions, after, before, strict=True)
    ]
    judgements = judged_by_referee(context, comparisons, bar)
    outcomes = [outcome(judgement, config.verdicts.tie) for judgement in judgements]
    ask_ahead(gold, [(q.text, t) for q, b, a in zip(questions, before, after, strict=True) for t in (b.text, a.text)])
    right = [_both_right(gold, q.text, (b.text, a.text)) for q, b, a in zip(questions, before, after, strict=True)]
    answered = [
        Answered(
            *(q.text, b.text, a.text, len(b.ids), len(a.ids), b.finished, a.finished),
            *(a.kl, found, *(gold_says or (None, None))),
        )
        for q, b, a, found, gold_says in zip(questions, before, after, outcomes, right, strict=True)
    ]
    rows = zip(questions, before, after, judgements, strict=True)
    return answered, [_Row(q, b, a.ids, judgement.probability) for q, b, a, judgement in rows]


def _references(context: Context, answered: Sequence[Answered], rows: Sequence[_Row]) -> ReferenceScores | None:
    """Score the replies against the references of the user's file; None if there are none."""
    references = context.given.references if context.given else {}
    try:
        return score_by_references(answered, [references.get(row.question.id, ()) for row in rows])
    except MissingPackageError as error:
        context.terminal.note(f"evaluation: replies are not compared with the references of the file, because {error}")
        return None


def _scores_of_replies(context: Context, rows: Sequence[_Row], score: Score) -> list[tuple[float, float]]:
    """Return the evaluator's scores of the replies before and after training."""
    if not rows:
        return []
    prompts = [context.grade_prompt(row.question.id, row.question.text) for row in rows for _ in range(2)]
    scores = score(prompts, [ids for row in rows for ids in (row.before.ids, row.after_ids)]).mean(0).tolist()
    return list(zip(scores[0::2], scores[1::2], strict=True))


def _results(context: Context, pairs: Sequence[JudgedPair]) -> QuestionResults:
    temperature = temperature_of(context.store.root / "roles").value
    return results_of(context.store.read("verdicts", Verdict), pairs, temperature)


def _samples(context: Context, answered: Sequence[Answered], scores: Sequence[tuple[float, float]]) -> list[Sample]:
    """Return a few random replies before and after training, drawn with the run's seed rather than picked."""
    count = min(context.config.evaluation.samples, len(answered))
    picked = context.random("samples").sample(list(zip(answered, scores, strict=True)), count)
    return [sample_of(a, *both) for a, both in picked]


def _scored(pair: JudgedPair) -> ScoredPair:
    verdict = pair.verdict
    return ScoredPair(
        *(verdict.question_id, verdict.first, verdict.second, verdict.state, verdict.probability),
        *(round(pair.margin, 6), round(pair.disagreement, 6), *(pair.right or (None, None))),
    )


def _compared(row: _Row, answered: Answered, scores: tuple[float, float]) -> ComparedReplies:
    return ComparedReplies(
        question_id=row.question.id,
        before=row.before.id,
        after=answered.after,
        outcome=answered.outcome,
        probability=row.probability,
        score_before=round(scores[0], 6),
        score_after=round(scores[1], 6),
        gold_before=answered.gold_before,
        gold_after=answered.gold_after,
        tokens_before=answered.tokens_before,
        tokens_after=answered.tokens_after,
        finished_before=answered.finished_before,
        finished_after=answered.finished_after,
        kl=round(answered.kl, 6),
    )


def _replies(context: Context, answered: Sequence[Answered], questions: Iterable[Question]) -> Replies:
    before, after = [a.finished_before for a in answered], [a.finished_after for a in answered]
    replies = context.store.read("replies", Reply)
    return measure_replies(context.reply_limit, replies, before, after, texts_of_training_questions(questions, replies))


def _unit_tests(gold: Gold | None) -> UnitTests | None:
    counts = count_outcomes(gold)
    if counts is None:
        return None
    return UnitTests(n=counts.total(), **{reason.replace(" ", "_"): n for reason, n in counts.items()})


def _alarms(context: Context) -> list[Alarm]:
    return [Alarm(**row) for row in context.store.read_metrics("watchdogs")]


# -- replies of the training --------------------------------------------------------------------------------------------


def _checked_replies(context: Context, questions: Mapping[str, Question], gold: Gold) -> dict[int, list[CheckedReply]]:
    """Return the first replies of each iteration whose question has gold, without iterations that were rolled back."""
    found: dict[int, list[CheckedReply]] = {}
    counted = {int(line["step"]) for line in context.store.read_metrics("policy")}
    # A roll-back removes the metrics of its iterations, while their samples stay until they are overwritten.
    samples = [sample for sample in context.store.read("policy", Sampled) if sample.step in counted]
    most = context.config.evaluation.gold_replies
    ask_ahead(gold, [(questions[sample.question_id].text, sample.text) for sample in _firsts_of_steps(samples, most)])
    for sample in samples:
        replies = found.setdefault(sample.step, [])
        if len(replies) == most:
            continue
        right = gold.is_right(questions[sample.question_id].text, sample.text)
        if right is not None:
            replies.append(CheckedReply(sample.question_id, sample.score, right))
    return found


def _firsts_of_steps(samples: Sequence[Sampled], most: int) -> list[Sampled]:
    by_step: dict[int, list[Sampled]] = {}
    for sample in samples:
        by_step.setdefault(sample.step, []).append(sample)
    return [sample for step in by_step.values() for sample in step[:most]]


def _write_gold_curve(context: Context, predicted: Mapping[int, Sequence[PredictedReply]]) -> None:
    """Write metrics/evaluation.jsonl: the predicted and actual accuracy of each iteration's replies."""
    rows = [
        {"step": step, "gold": round(shares.gold, 6), "expected": round(shares.predicted, 6), "n": shares.n}
        for step, shares in shares_of(predicted).items()
    ]
    if not rows:
        return
    context.store.write_text(context.store.metrics_path("evaluation"), "".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        context.trackers.log("evaluation", row)


def _over_optimisation(context: Context, predicted: Mapping[int, Sequence[PredictedReply]]) -> OverOptimisation | None:
    kls = {int(row["step"]): row["kl"] for row in context.store.read_metrics("policy")}
    return measure_over_optimisation(predicted, kls)
