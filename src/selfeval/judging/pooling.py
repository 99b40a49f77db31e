"""The result of one prompt of a judge with labels, and the mean of several sampled results.

Self-consistency (Wang et al. 2022, https://arxiv.org/abs/2203.11171) samples several chains of thought and marginalises over
them: p(label) = Σ_chain p(chain) p(label | chain). The mean over samples is its unbiased estimate, and uses the probability of
each vote's labels rather than its most likely label alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from selfeval.records import Unreadable

__all__ = ["FEWEST_READABLE", "Reading", "Spread", "pool_votes"]

FEWEST_READABLE = 0.5
"""Share of readable votes below which a prompt has no probabilities."""


@dataclass(frozen=True)
class Spread:
    """How far sampled votes agree.

    Attributes:
        readable: number of votes with probabilities.
        entropy: entropy in nats of the most likely labels of these votes; None without any.
    """

    readable: int
    entropy: float | None


@dataclass(frozen=True)
class Reading:
    """The result of one prompt.

    Attributes:
        probabilities: probability of each label, in the order in which the kind of template declares them; they need not add
            up to 1. None if the output is unparsable.
        raw_output: the output of the judge.
        cause: Optional. Why the output is unparsable, or TRUNCATED if its probabilities were read although it was cut off.
        label_mass: Optional. Probability of all labels together at the position of the verdict; None if there is no position.
        spread: Optional. Agreement of the votes, if it is the mean of several. Default: none, it is a single output.
    """

    probabilities: tuple[float, ...] | None
    raw_output: str
    cause: Unreadable | None = None
    label_mass: float | None = None
    spread: Spread | None = None


def pool_votes(votes: Sequence[Reading]) -> Reading:
    """Return the mean of sampled votes on one prompt.

    With p_vl the probability of label l in vote v, scaled to Σ_l p_vl = 1, and R readable votes:

    p_l = (1 / R) Σ_v p_vl

    A vote without a verdict abstains. If less than `FEWEST_READABLE` of all votes are readable, there are no probabilities, and
    the cause is the most frequent one. Otherwise the cause is TRUNCATED if more than half of the readable votes were cut off.
    The spread is the vote entropy −Σ_l s_l ln s_l, with s_l the share of readable votes whose most likely label is l (Engelson
    and Dagan 1996, section 3.3, https://arxiv.org/abs/cmp-lg/9606030).

    Args:
        votes: at least one vote. The output of the first one is kept.

    Example:
        >>> found = pool_votes([Reading((0.6, 0.2), "A"), Reading((0.1, 0.3), "B"), Reading(None, "?", Unreadable.CUT)])
        >>> found.probabilities, round(found.spread.entropy, 3)
        ((0.5, 0.5), 0.693)
    """
    readable = [vote for vote in votes if vote.probabilities is not None]
    masses = [vote.label_mass for vote in votes if vote.label_mass is not None]
    mass, text, spread = fmean(masses) if masses else None, votes[0].raw_output, _spread(readable)
    if not readable or len(readable) < FEWEST_READABLE * len(votes):
        causes = Counter(vote.cause for vote in votes if vote.probabilities is None)
        return Reading(None, text, causes.most_common(1)[0][0], mass, spread)
    truncated = sum(vote.cause == Unreadable.TRUNCATED for vote in readable)
    cause = Unreadable.TRUNCATED if 2 * truncated > len(readable) else None
    shares = [_scaled(vote) for vote in readable]
    return Reading(tuple(map(fmean, zip(*shares, strict=True))), text, cause, mass, spread)


def _scaled(vote: Reading) -> tuple[float, ...]:
    assert vote.probabilities is not None
    total = math.fsum(vote.probabilities)
    return tuple(probability / total for probability in vote.probabilities)


def _spread(readable: Sequence[Reading]) -> Spread:
    if not readable:
        return Spread(0, None)
    chosen = Counter(max(range(len(p)), key=p.__getitem__) for vote in readable if (p := vote.probabilities) is not None)
    shares = [count / len(readable) for count in chosen.values()]
    # `0 -` instead of a sign: the entropy of one label would otherwise be -0.0.
    return Spread(len(readable), 0.0 - math.fsum(share * math.log(share) for share in shares))
