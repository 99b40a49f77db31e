"""Compare the labels of steps with gold, and the step evaluator with the evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfeval.evaluation.evaluator import JudgedPair, by_gold
from selfeval.quality.comparisons import compare_paired
from selfeval.quality.statistics import mean_figure, proportion
from selfeval.report.schema import Steps

__all__ = ["GoldStep", "measure_steps"]


@dataclass(frozen=True)
class GoldStep:
    """A labelled step with its gold label.

    Attributes:
        question_id: its question.
        label: label from completions, in [0, 1].
        right: whether the reply is right up to the end of the step, by gold.
    """

    question_id: str
    label: float
    right: bool


def measure_steps(
    replies: int,
    steps: int,
    gold_steps: Sequence[GoldStep] | None,
    pairs: Sequence[JudgedPair],
    margins: Sequence[float],
    *,
    has_gold: bool,
) -> Steps:
    """Return the figures of the step evaluator.

    Args:
        replies: number of labelled replies.
        steps: number of labelled steps.
        gold_steps: the steps with their gold labels; None without gold of steps.
        pairs: judged test pairs.
        margins: score by steps of the first reply minus that of the second, per pair.
        has_gold: whether the domain has gold.
    """
    own, evaluators = _credits(pairs, margins)
    return Steps(
        replies=replies,
        steps=steps,
        labels_gold=None if gold_steps is None else mean_figure(_agreements(gold_steps)),
        accuracy_gold=proportion([credit == 1.0 for credit in own]) if has_gold else None,
        gain=compare_paired(own, evaluators) if has_gold else None,
    )


def _credits(pairs: Sequence[JudgedPair], margins: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return 1 for each pair with one right reply that scores strictly higher, else 0: by steps, and by the evaluator."""
    by_steps = [replace(pair, margin=margin) for pair, margin in zip(pairs, margins, strict=True)]
    own, evaluators = ([float(found.evaluator_right) for found in by_gold(some)] for some in (by_steps, pairs))
    return own, evaluators


def _agreements(steps: Sequence[GoldStep]) -> list[float]:
    """Return the share of labels on the side of gold for each question, whose steps are no independent cases."""
    by_question: dict[str, list[bool]] = {}
    for step in steps:
        by_question.setdefault(step.question_id, []).append((step.label >= 0.5) == step.right)
    return [sum(agreeing) / len(agreeing) for agreeing in by_question.values()]
