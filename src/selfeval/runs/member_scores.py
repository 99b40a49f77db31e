"""The score of a reply by an ensemble of evaluators, with the scores of its members.

Shapes: K members.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["MemberScores", "disagreement"]


class MemberScores(float):
    """The mean of the members' scores, as a float that also has these scores.

    Args:
        members: [K] score of each member.

    Example:
        >>> score = MemberScores([1.0, 2.0])
        >>> score, score.members
        (1.5, (1.0, 2.0))
    """

    members: tuple[float, ...]

    def __new__(cls, members: Sequence[float]) -> MemberScores:
        made = super().__new__(cls, statistics.fmean(members))
        made.members = tuple(members)
        return made


def disagreement(a: float, b: float) -> float:
    """Return the standard deviation over the members of score a minus score b; 0 for scores of a single evaluator.

    Example:
        >>> disagreement(MemberScores([1.0, 2.0]), MemberScores([0.0, 0.0])), disagreement(1.0, 0.0)
        (0.5, 0.0)
    """
    if not (isinstance(a, MemberScores) and isinstance(b, MemberScores)):
        return 0.0
    return statistics.pstdev(x - y for x, y in zip(a.members, b.members, strict=True))
