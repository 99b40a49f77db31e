"""Compare the evaluator with its baselines on the judged test pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfeval.quality.calibration import aurc, calibration_error, reliability_bins, risk_coverage
from selfeval.quality.comparisons import Comparison, compare_paired, compare_with_level
from selfeval.quality.margin_signals import MarginCalibration
from selfeval.quality.statistics import mean_figure, proportion, sigmoid, spearman_figure
from selfeval.records import Reply, Verdict, VerdictState
from selfeval.report.schema import (
    Attacks,
    Baselines,
    Bin,
    Disagreement,
    Evaluator,
    EvaluatorComparisons,
    EvaluatorConfidence,
    FirstPairs,
    TokensPerVerdict,
)

__all__ = [
    "EvaluatorFacts",
    "JudgedPair",
    "LabelledPair",
    "Rights",
    "by_gold",
    "by_judge",
    "compare_with_rules",
    "measure_evaluator",
    "measure_first_pairs",
    "rights_of",
]


@dataclass(frozen=True)
class JudgedPair:
    """A judged test pair with any verdict.

    Attributes:
        verdict: verdict of the judge.
        replies: the first and the second reply.
        margin: evaluator score of the first reply minus that of the second.
        disagreement: standard deviation of the margin over the members of an ensemble; 0 for a single evaluator.
        right: whether each reply is right by gold (None if gold has no answer); None without gold.
        surprise: Optional. Negative mean log-prob per unit of both replies under an n-gram model of the run, in nats. Default:
            not measured.
    """

    verdict: Verdict
    replies: tuple[Reply, Reply]
    margin: float
    disagreement: float
    right: tuple[bool | None, bool | None] | None
    surprise: tuple[float, float] | None = None


@dataclass(frozen=True)
class LabelledPair:
    """A pair with the index of the better reply, 0 or 1, by gold or by the judge."""

    pair: JudgedPair
    better: int

    @property
    def question_id(self) -> str:
        return self.pair.verdict.question_id

    @property
    def evaluator_right(self) -> bool:
        """Whether the evaluator scores the better reply strictly higher; equal scores are wrong."""
        return self.pair.margin != 0 and (self.pair.margin > 0) == (self.better == 0)


@dataclass(frozen=True)
class EvaluatorFacts:
    """Settings and counts of the evaluators.

    Attributes:
        temperature: temperature of the confidence, sigmoid(|margin| / temperature).
        temperature_pairs: number of pairs used to fit the temperature.
        pairs_trained: number of pairs used to train the evaluators.
        members: number of evaluators.
        labels_from_file: the verdicts are pairs from a file, so no judge was asked. Default: False.
        confidence: Optional. Map from margin and disagreement to the confidence. Default: the margin alone decides.
    """

    temperature: float
    temperature_pairs: int
    pairs_trained: int
    members: int
    labels_from_file: bool = False
    confidence: MarginCalibration | None = None

    def confidence_in(self, pair: JudgedPair) -> float:
        """Return the confidence in the reply that the evaluator prefers, at least 0.5."""
        if self.confidence is None:
            return sigmoid(abs(pair.margin) / self.temperature)
        return self.confidence.confidence(pair.margin, pair.disagreement)


def by_gold(pairs: Sequence[JudgedPair]) -> list[LabelledPair]:
    """Return the pairs with exactly one right reply, whatever the judge's verdict."""
    found = []
    for pair in pairs:
        first, second = pair.right or (None, None)
        # Two right or two wrong replies have no better one.
        if first is not None and second is not None and first != second:
            found.append(LabelledPair(pair, 0 if first else 1))
    return found


def by_judge(pairs: Sequence[JudgedPair]) -> list[LabelledPair]:
    """Return the kept pairs, labelled by the judge's choice.

    A pair of a file with a confidence of exactly 0.5 has no better reply and is left out.
    """
    kept = [pair for pair in pairs if pair.verdict.state == VerdictState.KEPT]
    preferences = [(pair, _preference_of_judge(pair)) for pair in kept]
    return [LabelledPair(pair, 1 if preference < 0 else 0) for pair, preference in preferences if preference]


def measure_evaluator(
    pairs: Sequence[JudgedPair],
    facts: EvaluatorFacts,
    first_pairs: FirstPairs,
    cost: TokensPerVerdict | None,
    attacks: Attacks | None = None,
    *,
    has_gold: bool,
) -> Evaluator:
    """Measure the evaluator on judged test pairs.

    Args:
        pairs: all judged test pairs.
        facts: settings and counts of the evaluators.
        first_pairs: results on the test pairs of round 1.
        cost: tokens per verdict.
        attacks: Optional. Figures on attack replies. Default: none were scored.
        has_gold: whether there is a gold oracle, even if it has no answer to any of these questions.
    """
    gold, judge = by_gold(pairs), by_judge(pairs)
    # Baselines, calibration and risk use one set of labels: gold if it labels at least one pair.
    labelled = gold or judge
    # Confidence in the reply that the evaluator prefers, so it is at least 0.5.
    confidence = [facts.confidence_in(p.pair) for p in labelled]
    right = [p.evaluator_right for p in labelled]
    judge_asked = not (facts.labels_from_file and labelled)
    correct = [float(r) for r in right]
    return Evaluator(
        accuracy_gold=proportion([p.evaluator_right for p in gold]) if has_gold else None,
        accuracy_judge=proportion([p.evaluator_right for p in judge]),
        first_pairs=first_pairs,
        pairs_trained=facts.pairs_trained,
        baselines=_baselines(labelled, with_judge=judge_asked),
        baselines_on="gold" if gold else "judge",
        comparisons=compare_with_rules(labelled, with_judge=judge_asked and bool(gold)),
        ece=calibration_error(confidence, right),
        brier=mean_figure([(sure - c) ** 2 for sure, c in zip(confidence, correct, strict=True)]),
        temperature=facts.temperature,
        temperature_pairs=facts.temperature_pairs,
        members=facts.members,
        confidence=None if facts.confidence is None else _confidence(labelled, facts, facts.confidence),
        disagreement=_disagreement(labelled) if facts.members > 1 else None,
        risk_coverage=tuple(risk_coverage(confidence, correct)) if correct else (),
        calibration=tuple(Bin(confidence=c, accuracy=a, n=n) for c, a, n in reliability_bins(confidence, correct)),
        cost=cost,
        attacks=attacks,
    )


def _confidence(labelled: Sequence[LabelledPair], facts: EvaluatorFacts, found: MarginCalibration) -> EvaluatorConfidence:
    plain = [sigmoid(abs(p.pair.margin) / facts.temperature) for p in labelled]
    both, right = [facts.confidence_in(p.pair) for p in labelled], [p.evaluator_right for p in labelled]
    credit = [float(is_right) for is_right in right]
    return EvaluatorConfidence(
        **found.weights,
        scale=found.scale,
        steps=found.steps,
        ece_of_margin=calibration_error(plain, right),
        aurc=aurc(both, credit),
        aurc_of_margin=aurc(plain, credit),
    )


def _disagreement(labelled: Sequence[LabelledPair]) -> Disagreement:
    disagreement = [p.pair.disagreement for p in labelled]
    return Disagreement(error_correlation=spearman_figure(disagreement, [float(not p.evaluator_right) for p in labelled]))


# -- round 1's pairs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rights:
    """Whether the evaluator is right on the pair of each question, by gold and by the judge."""

    gold: Mapping[str, bool]
    judge: Mapping[str, bool]


def rights_of(pairs: Sequence[JudgedPair]) -> Rights:
    """Return whether the evaluator is right on each pair."""
    gold, judge = ({p.question_id: p.evaluator_right for p in labelled} for labelled in (by_gold(pairs), by_judge(pairs)))
    return Rights(gold, judge)


def measure_first_pairs(now: Rights, before: Rights | None, *, has_gold: bool) -> FirstPairs:
    """Measure the evaluator on the test pairs of round 1, and its gain over the evaluator of the previous round.

    Args:
        now: results of this round's evaluator.
        before: results of the previous round's evaluator; None in round 1.
        has_gold: whether the gain is measured by gold instead of the judge.
    """
    comparison = None
    if before is not None:
        # Both rounds evaluated the same pairs, so `theirs` has every question of `ours`.
        ours, theirs = (now.gold, before.gold) if has_gold else (now.judge, before.judge)
        comparison = compare_paired([float(right) for right in ours.values()], [float(theirs[question]) for question in ours])
    return FirstPairs(
        accuracy_gold=proportion(list(now.gold.values())) if has_gold else None,
        accuracy_judge=proportion(list(now.judge.values())),
        gain=None if comparison is None else comparison.difference,
        comparison=comparison,
    )


# -- baselines ----------------------------------------------------------------------------------------------------------

Rule = Callable[[JudgedPair], float]
"""A preference: positive for the first reply, negative for the second."""


def _preference_of_judge(pair: JudgedPair) -> float:
    return 0.0 if pair.verdict.probability is None else pair.verdict.probability - 0.5


def _preference_of_length(pair: JudgedPair) -> float:
    return len(pair.replies[0].text) - len(pair.replies[1].text)


def _preference_of_logprob(pair: JudgedPair) -> float:
    first, second = (_mean_logprob(reply) for reply in pair.replies)
    return 0.0 if first == second else first - second


def _mean_logprob(reply: Reply) -> float:
    # Per token, or the shorter reply would nearly always win. A reply that was cut off inside its chain of thought has no
    # tokens: their sum, 0, would be the highest log-prob.
    is_missing = not reply.text and not reply.finished
    return -math.inf if is_missing else reply.logprob / max(1, len(reply.ids))


def _preference_of_ngrams(pair: JudgedPair) -> float:
    # An empty or unfinished reply never wins against another one, however usual its words are.
    first, second = zip(pair.surprise or (0.0, 0.0), pair.replies, strict=True)
    faults = [(math.isinf(surprise), not reply.finished) for surprise, reply in (first, second)]
    if faults[0] != faults[1]:
        return 1.0 if faults[0] < faults[1] else -1.0
    return 0.0 if first[0] == second[0] else second[0] - first[0]


def _has_ngrams(labelled: Sequence[LabelledPair]) -> bool:
    return bool(labelled) and all(p.pair.surprise is not None for p in labelled)


def _credits(labelled: Sequence[LabelledPair], rule: Rule) -> list[float]:
    """Return the credit of a rule on each pair: 1 if it prefers the better reply, 0 if the other, 0.5 for a tie."""
    return [_credit(rule(p.pair), p.better) for p in labelled]


def _credit(preference: float, better: int) -> float:
    return 0.5 if preference == 0 else float((preference > 0) == (better == 0))


def _baselines(labelled: Sequence[LabelledPair], *, with_judge: bool) -> Baselines:
    return Baselines(
        longer_wins=mean_figure(_credits(labelled, _preference_of_length)),
        first_wins=mean_figure(_credits(labelled, lambda _: 1.0)),
        mean_logprob=mean_figure(_credits(labelled, _preference_of_logprob)),
        ngram=mean_figure(_credits(labelled, _preference_of_ngrams)) if _has_ngrams(labelled) else None,
        judge=mean_figure(_credits(labelled, _preference_of_judge)) if with_judge else None,
    )


def compare_with_rules(labelled: Sequence[LabelledPair], *, with_judge: bool = False) -> EvaluatorComparisons:
    """Compare the evaluator with each baseline, and with chance level.

    Args:
        labelled: pairs with their labels.
        with_judge: whether to compare it with the judge. Not if no judge was asked, or if it gave the labels: then it is right
            by construction. Default: False.
    """
    ours, questions = [float(p.evaluator_right) for p in labelled], [p.question_id for p in labelled]

    def less(rule: Rule) -> Comparison:
        return compare_paired(ours, _credits(labelled, rule), questions)

    return EvaluatorComparisons(
        longer_wins=less(_preference_of_length),
        first_wins=less(lambda _: 1.0),
        mean_logprob=less(_preference_of_logprob),
        ngram=less(_preference_of_ngrams) if _has_ngrams(labelled) else None,
        judge=less(_preference_of_judge) if with_judge else None,
        chance=compare_with_level(ours, 0.5, questions),
    )
