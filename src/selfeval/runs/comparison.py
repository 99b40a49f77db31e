"""The result of comparing two replies to a question, by an evaluator or by a judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfeval.errors import InputError
from selfeval.judging.protocol import Judgement
from selfeval.records import VerdictState

__all__ = ["Comparison", "Preferred", "check_sure"]

Preferred = Literal["a", "b", "unsure"]


@dataclass(frozen=True)
class Comparison:
    """Which of two replies, a or b, is better.

    Attributes:
        probability: probability that a is better; None if the judge's answer was unparsable.
        preferred: `a`, `b`, or `unsure` if the confidence is too low.
        state: reason: `kept` (sure), `unsure`, and for a judge also `tie` and `unparsable`.
        scores: scores of a and of b; None if a judge compared them.
        calibrated: whether the evaluator's temperature was fitted on held-out pairs; False for a judge.
        judgement: result of the judge, with its evidence; None if an evaluator compared them.

    Example:
        >>> Comparison(probability=0.25, preferred="b", state="kept").confidence
        0.75
    """

    probability: float | None
    preferred: Preferred
    state: VerdictState
    scores: tuple[float, float] | None = None
    calibrated: bool = False
    judgement: Judgement | None = None

    @property
    def confidence(self) -> float | None:
        """Probability of the more likely reply, from 0.5 to 1; None if there is no probability."""
        return None if self.probability is None else max(self.probability, 1.0 - self.probability)


def check_sure(sure: float) -> None:
    """Refuse a confidence threshold that no comparison could fail or reach.

    Raises:
        InputError: it is not between 0.5 and 1.
    """
    if not 0.5 <= sure <= 1:  # NaN too
        raise InputError(f"sure must be between 0.5 and 1, got {sure}")
