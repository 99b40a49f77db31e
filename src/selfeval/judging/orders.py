"""Both orders of a comparison: what was read in each, how they are combined, and the choice of each.

Averaging both orders removes the position bias (Zheng et al. 2023, https://arxiv.org/abs/2306.05685, section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfeval.judging.protocol import Judgement
from selfeval.records import PairwiseEvidence

__all__ = ["Choice", "Reading", "choice", "combine"]

Choice = Literal["first", "second", "neither"]


@dataclass(frozen=True)
class Reading:
    """The result of one order of a comparison: label probabilities (None if unparsable) and the judge's raw output."""

    probabilities: tuple[float, float, float] | None
    raw_output: str

    @property
    def first_better(self) -> float | None:
        """Probability that the reply shown first is better, plus half of that of `neither`."""
        if self.probabilities is None:
            return None
        first, second, tie = self.probabilities
        return (first + tie / 2) / (first + second + tie)

    @property
    def tie(self) -> float | None:
        return None if self.probabilities is None else self.probabilities[2] / sum(self.probabilities)


def combine(in_order: Reading, swapped: Reading) -> Judgement:
    """Average both orders. The probability is None if either order was unparsable."""
    forward = in_order.first_better
    # In the swapped prompt, the comparison's first reply was shown second.
    backward = None if swapped.first_better is None else 1.0 - swapped.first_better
    ties, outputs = (in_order.tie, swapped.tie), (in_order.raw_output, swapped.raw_output)
    evidence = PairwiseEvidence(forward, backward, ties, outputs)
    if forward is None or backward is None or in_order.tie is None or swapped.tie is None:
        return Judgement(None, None, evidence)
    return Judgement((forward + backward) / 2, (in_order.tie + swapped.tie) / 2, evidence)


def choice(first: float, tie: float) -> Choice:
    """Return the choice of one order: the likeliest of its three labels, `neither` on a tie.

    Args:
        first: probability that the first is better, including half of `neither`, as in `PairwiseEvidence.in_order`.
        tie: probability of `neither`.
    """
    # Undo the half of `neither` that is included: the probabilities of first and second alone.
    ahead = first - tie / 2, 1 - first - tie / 2
    if tie >= max(ahead) or ahead[0] == ahead[1]:
        return "neither"
    return "first" if ahead[0] > ahead[1] else "second"
