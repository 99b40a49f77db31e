"""The choice of each order of a comparison, and whether both agree. This module does not import torch."""

from __future__ import annotations

from typing import Literal

from selfeval.records import PairwiseEvidence, Verdict

__all__ = ["Choice", "choice", "choices_of", "is_consistent"]

Choice = Literal["first", "second", "neither"]


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


def is_consistent(verdict: Verdict) -> bool | None:
    """Return whether both orders chose the same of first, second and neither; None if one was not asked or not parsed.

    `neither` is a choice because the probability of a clear tie is close to one half: forced to choose between two replies, the
    orders of a consistent judge would agree or disagree by chance.
    """
    choices = choices_of(verdict)
    return None if None in choices else choices[0] == choices[1]


def choices_of(verdict: Verdict) -> tuple[Choice | None, Choice | None]:
    """Return the reply of the pair that each order chose, in order and swapped; None for one that was not asked or not parsed.

    `first` and `second` name the replies of the pair, whatever their position in the prompt.
    """
    evidence = verdict.evidence
    if not isinstance(evidence, PairwiseEvidence):
        return None, None
    (in_order, swapped), (tie, other_tie) = (evidence.in_order, evidence.swapped), evidence.ties
    return _choice(in_order, tie), _choice(swapped, other_tie)


def _choice(better: float | None, tie: float | None) -> Choice | None:
    return None if better is None or tie is None else choice(better, tie)
