"""Predicted and actual accuracy of the policy's training replies, over its distance from the initial policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from selfeval.quality.overoptimisation import GainCurve, fit_reinforcement, logistic_fit
from selfeval.quality.statistics import Figure, clustered_mean, sigmoid
from selfeval.report.schema import CurveFit, Fits, OverOptimisation

__all__ = [
    "FEWEST_POINTS",
    "CheckedReply",
    "PredictedReply",
    "Shares",
    "measure_over_optimisation",
    "predict",
    "shares_of",
]

FEWEST_POINTS = 4
"""Minimum number of iterations for a curve with two coefficients."""


@dataclass(frozen=True)
class CheckedReply:
    """A training reply with its evaluator score, and whether it is right by gold."""

    question_id: str
    score: float
    right: bool


@dataclass(frozen=True)
class PredictedReply:
    """A training reply with the probability of being right that its score predicts."""

    question_id: str
    probability: float
    right: bool


@dataclass(frozen=True)
class Shares:
    """Replies of one iteration: the share of right ones predicted by the scores, the share by gold, and their number."""

    predicted: float
    gold: float
    n: int


def predict(checked: Mapping[int, Sequence[CheckedReply]]) -> dict[int, list[PredictedReply]]:
    """Convert scores to probabilities, by a logistic fit on the first iteration.

    The first iteration is used because the policy has not yet learned to exploit the evaluator.

    Args:
        checked: replies by iteration; iterations without replies are skipped.
    """
    known = {step: replies for step, replies in checked.items() if replies}
    if not known:
        return {}
    first = known[min(known)]
    slope, offset = logistic_fit([reply.score for reply in first], [reply.right for reply in first])
    return {
        step: [PredictedReply(r.question_id, sigmoid(slope * r.score + offset), r.right) for r in replies]
        for step, replies in known.items()
    }


def shares_of(predicted: Mapping[int, Sequence[PredictedReply]]) -> dict[int, Shares]:
    """Return predicted and actual accuracy by iteration, in ascending order."""
    return {
        step: Shares(fmean(r.probability for r in replies), fmean(r.right for r in replies), len(replies))
        for step, replies in sorted(predicted.items())
    }


def measure_over_optimisation(
    predicted: Mapping[int, Sequence[PredictedReply]], kls: Mapping[int, float | None]
) -> OverOptimisation | None:
    """Fit the curve of Gao et al. 2022 to the gain by the evaluator and by gold, over the square root of the KL.

    Args:
        predicted: replies by iteration.
        kls: KL to the reference by iteration, in nats.

    Returns:
        The points and fits, or None for fewer than four distinct distances.
    """
    shares = shares_of(predicted)
    # Estimates of the KL may be negative or missing (NaN is logged as null); such iterations have no distance.
    points = [(math.sqrt(kl), s.predicted, s.gold) for step, s in shares.items() if (kl := kls.get(step) or 0.0) > 0.0]
    distances = [distance for distance, _, _ in points]
    if len(set(distances)) < FEWEST_POINTS:
        return None
    # Gains are relative to the first iteration, whose KL is about 0.
    start = shares[min(shares)]
    return OverOptimisation(
        points=tuple(points),
        start=(start.predicted, start.gold),
        fit=Fits(
            evaluator=_fit(fit_reinforcement(distances, [predicted - start.predicted for _, predicted, _ in points])),
            gold=_fit(fit_reinforcement(distances, [gold - start.gold for _, _, gold in points])),
        ),
        gap=_gap(predicted),
    )


def _fit(curve: GainCurve) -> CurveFit:
    return CurveFit(**asdict(curve))


def _gap(predicted: Mapping[int, Sequence[PredictedReply]]) -> Figure:
    """Return predicted minus actual accuracy in the last quarter of the iterations.

    It is clustered by question: an iteration has several replies to each question, and later iterations may ask it again.
    """
    # The end of the training, where over-optimisation shows; at least one iteration.
    last = [reply for step in sorted(predicted)[-max(1, len(predicted) // 4) :] for reply in predicted[step]]
    return clustered_mean([reply.probability - reply.right for reply in last], [reply.question_id for reply in last])
