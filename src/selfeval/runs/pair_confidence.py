"""The probability that one reply beats another, from their scores by the trained evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfeval.quality.margin_signals import MarginCalibration
from selfeval.quality.statistics import sigmoid
from selfeval.runs.member_scores import disagreement
from selfeval.runs.members import Temperature, confidence_of, temperature_of

__all__ = ["PairConfidence"]


@dataclass(frozen=True)
class PairConfidence:
    """The map from two scores to a probability, fitted on held-out pairs.

    Attributes:
        temperature: of sigmoid(margin / temperature).
        signals: map of margin and disagreement (`evaluator.confidence`); None if the margin alone decides.
    """

    temperature: Temperature
    signals: MarginCalibration | None = None

    @classmethod
    def of(cls, roles: Path) -> PairConfidence:
        """Read it from a folder of roles.

        Raises:
            RunFolderError: the file of the evaluator is damaged.
        """
        return cls(temperature_of(roles), confidence_of(roles))

    @property
    def is_calibrated(self) -> bool:
        """Whether there were enough held-out pairs to fit it."""
        return self.temperature.pairs > 0

    def probability(self, a: float, b: float) -> float:
        """Compute the probability that the reply with score a beats the one with score b; 1/2 if the scores are equal.

        Example:
            >>> round(PairConfidence(Temperature(2.0, 100)).probability(3.0, 1.0), 3)
            0.731
        """
        margin = a - b
        if self.signals is None:
            return sigmoid(margin / self.temperature.value)
        sure = self.signals.confidence(margin, disagreement(a, b))
        return sure if margin >= 0 else 1.0 - sure

    def against_the_mean(self, score: float) -> float:
        """Compute the probability that a reply beats one with the mean score of the training replies, from the margin alone."""
        return sigmoid(score / self.temperature.value)
