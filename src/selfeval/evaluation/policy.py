"""Compare the policy before and after training, reply by reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from selfeval.evaluation.diversity import ReplyVectors, compare_diversity
from selfeval.quality.comparisons import Comparison, compare_paired, compare_with_level
from selfeval.quality.length_control import length_controlled_win_rate
from selfeval.quality.statistics import Figure, mean_figure, proportion, ratio_of_means
from selfeval.records import PairwiseEvidence
from selfeval.report.schema import Alarm, OverOptimisation, Policy, PolicyComparisons, Sample

if TYPE_CHECKING:  # torch is loaded along with it, and a page that compares runs needs no model
    from selfeval.judging.protocol import Judgement

__all__ = ["CREDITS", "Answered", "Outcome", "compare_gold", "gold_share", "measure_policy", "outcome", "sample_of"]

Outcome = Literal["win", "tie", "loss", "unparsable"]
CREDITS: dict[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
"""Score of an outcome; an unparsable one has none."""


@dataclass(frozen=True)
class Answered:
    """A test question with the replies before and after training.

    Attributes:
        question: text of the question.
        before, after: texts of the replies.
        tokens_before, tokens_after: number of tokens of the replies.
        finished_before, finished_after: whether each reply ended before the token limit.
        kl: log-ratio of the reply after training, policy to initial policy, in nats.
        outcome: outcome of the comparison for the reply after training.
        gold_before, gold_after: whether each reply is right by gold; None if gold has no answer.
    """

    question: str
    before: str
    after: str
    tokens_before: int
    tokens_after: int
    finished_before: bool
    finished_after: bool
    kl: float
    outcome: Outcome
    gold_before: bool | None
    gold_after: bool | None


def outcome(judgement: Judgement, tie: float) -> Outcome:
    """Return the outcome of a comparison for its first reply, by its probability.

    It is a tie if the judge named one, if the two orders disagree, or if the probability is exactly one half.

    Args:
        judgement: result of the comparison.
        tie: the judge names a tie if its probability of `neither` is above this threshold.
    """
    if judgement.probability is None:
        return "unparsable"
    orders: tuple[float | None, ...] = (judgement.probability,)
    if isinstance(judgement.evidence, PairwiseEvidence):
        orders = (judgement.evidence.in_order, judgement.evidence.swapped)
    # -1, 0 or 1 per order: for the second reply, balanced, for the first reply.
    signs = {(p > 0.5) - (p < 0.5) for p in orders if p is not None}
    if (judgement.tie or 0.0) > tie or len(signs) > 1 or signs == {0}:
        return "tie"
    return "win" if judgement.probability > 0.5 else "loss"


def measure_policy(
    answered: Sequence[Answered],
    alarms: Sequence[Alarm],
    over_optimisation: OverOptimisation | None,
    *,
    has_gold: bool,
    vectors: ReplyVectors | None = None,
) -> Policy:
    """Compare the policy with the initial policy.

    Args:
        answered: the test questions with both replies.
        alarms: alarms of the watchdogs during training.
        over_optimisation: over-optimisation metrics, or None if they could not be measured.
        has_gold: whether there is a gold oracle, even if it has no answer to any of these questions.
        vectors: Optional. Vectors of the replies, for their Vendi score.
    """
    # Unparsable comparisons are left out rather than counted as ties; the report shows their number.
    decided = [(CREDITS[a.outcome], a) for a in answered if a.outcome != "unparsable"]
    scores = [score for score, _ in decided]
    longer = [float(a.tokens_after - a.tokens_before) for _, a in decided]
    counts, gold = Counter(a.outcome for a in answered), compare_gold(answered) if has_gold else None
    return Policy(
        win_rate=mean_figure(scores),
        # Ties have exactly 0.5 (`CREDITS`).
        win_rate_decisive=proportion([score == 1.0 for score in scores if score != 0.5]),
        length_controlled=length_controlled_win_rate(scores, longer),
        win=counts["win"],
        tie=counts["tie"],
        loss=counts["loss"],
        unparsable=counts["unparsable"],
        gold_before=gold_share([a.gold_before for a in answered]) if has_gold else None,
        gold_after=gold_share([a.gold_after for a in answered]) if has_gold else None,
        gold_gain=None if gold is None else gold.difference,
        comparisons=PolicyComparisons(gold=gold, win_rate=compare_with_level(scores)),
        kl=mean_figure([a.kl for a in answered], bounds=None),
        length_ratio=ratio_of_means([a.tokens_after for a in answered], [a.tokens_before for a in answered]),
        diversity=compare_diversity([a.before for a in answered], [a.after for a in answered], vectors),
        watchdogs=tuple(alarms),
        overoptimisation=over_optimisation,
    )


def gold_share(checked: Sequence[bool | None]) -> Figure:
    """Return the share of right replies among those with a gold answer."""
    return proportion([right for right in checked if right is not None])


def compare_gold(answered: Sequence[Answered]) -> Comparison:
    """Compare correctness after and before training, on the questions for which gold can judge both replies."""
    known = [(a.gold_after, a.gold_before) for a in answered if a.gold_before is not None and a.gold_after is not None]
    return compare_paired([float(after) for after, _ in known], [float(before) for _, before in known])


def sample_of(answered: Answered, score_before: float, score_after: float) -> Sample:
    """Return the sample of the report that shows both replies with their evaluator scores."""
    return Sample(
        question=answered.question,
        before=answered.before,
        after=answered.after,
        gold_before=answered.gold_before,
        gold_after=answered.gold_after,
        evaluator_before=round(score_before, 4),
        evaluator_after=round(score_after, 4),
        verdict=answered.outcome,
    )
