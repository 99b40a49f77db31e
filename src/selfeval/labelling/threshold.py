"""The confidence below which the evaluator says "unsure", chosen from labels for a wanted error rate.

The guarantee of `choose_threshold` needs pairs that are drawn uniformly. Half of the queue is: the pairs up to a place of its
uniform order, wherever they were drawn. The others are too often pairs on which the evaluator is wrong, so they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.labelling.agreement import Answered
from selfeval.labelling.queue import confidence_of
from selfeval.quality.label_agreement import credit_of
from selfeval.quality.selective_risk import DELTA, Threshold, choose_threshold, fewest_labels

__all__ = ["ERROR", "label_threshold", "labels_needed", "uniform_sample"]

ERROR = 0.1
"""Wanted error rate among the pairs on which the evaluator is sure."""


def uniform_sample(answered: Sequence[Answered]) -> list[Answered]:
    """Return the answered pairs that are a uniform sample of all pairs, in their uniform order.

    These are the pairs before the last uniform draw. That draw itself is left out: it is the one at which the counting stops,
    and it is never a pair that the other half of the queue drew earlier.

    Args:
        answered: answered pairs in the order of the queue.
    """
    end = max((pair.draw.rank for pair in answered if pair.draw.uniform), default=0)
    return sorted((pair for pair in answered if pair.draw.rank < end), key=lambda pair: pair.draw.rank)


def label_threshold(answered: Sequence[Answered], temperature: float, error: float = ERROR, delta: float = DELTA) -> Threshold:
    """Choose the smallest confidence at which the evaluator's error against people is at most `error`; see `choose_threshold`.

    The cases are the decided pairs of `uniform_sample`, one per question.

    Args:
        answered: answered pairs in the order of the queue.
        temperature: temperature of the evaluator's confidence, > 0.
        error: wanted error rate, in (0, 1). Default: 0.1.
        delta: maximum probability of a higher one, in (0, 1). Default: 0.05.
    """
    decided = [pair for pair in uniform_sample(answered) if pair.is_decided]
    # The first pair of each question, in the uniform order.
    cases = list({pair.draw.pair.question_id: pair for pair in reversed(decided)}.values())
    margins = [pair.draw.pair.margin or 0.0 for pair in cases]
    # Equal scores are never sure, so no threshold selects them.
    confidence = [confidence_of(margin, temperature) if margin else 0.0 for margin in margins]
    right = [credit_of(margin, pair.choice) == 1 for margin, pair in zip(margins, cases, strict=True)]
    return choose_threshold(confidence, right, error, delta)


def labels_needed(threshold: Threshold) -> int:
    """Return the smallest number of sure pairs with which a threshold can pass, if the evaluator is right on all of them."""
    return fewest_labels(threshold.error, threshold.delta)
