"""Both orders of a comparison: what was read in each, and how they are combined.

Averaging both orders removes the position bias (Zheng et al. 2023, https://arxiv.org/abs/2306.05685, section 3.4).
"""

from __future__ import annotations

from selfeval.judging.pooling import Reading
from selfeval.judging.protocol import Judgement
from selfeval.records import PairwiseEvidence, SampledPairwiseEvidence

__all__ = ["combine"]


def combine(in_order: Reading, swapped: Reading) -> Judgement:
    """Average both orders. The probability is None if either order was unparsable.

    Args:
        in_order: probabilities of `first`, `second` and `neither` with the replies in their order.
        swapped: the same with the replies swapped.
    """
    (forward, tie), (other, other_tie) = _shares(in_order), _shares(swapped)
    backward = None if other is None else 1.0 - other
    evidence = PairwiseEvidence(
        forward,
        backward,
        (tie, other_tie),
        (in_order.raw_output, swapped.raw_output),
        (in_order.cause, swapped.cause),
        (in_order.label_mass, swapped.label_mass),
    )
    if (one := in_order.spread) is not None and (two := swapped.spread) is not None:
        readable, entropies = (one.readable, two.readable), (one.entropy, two.entropy)
        evidence = SampledPairwiseEvidence(**vars(evidence), readable_votes=readable, vote_entropies=entropies)
    if forward is None or backward is None or tie is None or other_tie is None:
        return Judgement(None, None, evidence)
    return Judgement((forward + backward) / 2, (tie + other_tie) / 2, evidence)


def _shares(reading: Reading) -> tuple[float, float] | tuple[None, None]:
    """Return the probability that the reply shown first is better, plus half of that of `neither`; and that of `neither`."""
    if reading.probabilities is None:
        return None, None
    first, second, tie = reading.probabilities
    return (first + tie / 2) / (first + second + tie), tie / sum(reading.probabilities)
