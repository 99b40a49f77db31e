"""Similarity of replies to different questions, cheap enough for every iteration of policy training.

Shapes: Q questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

__all__ = ["bigram_similarity"]

START = -1
"""Stands before the first token, so that a reply of one token has a bigram too."""


def bigram_similarity(replies: Sequence[Iterable[Sequence[int]]]) -> float | None:
    """Compute the mean cosine similarity of the bigram counts of replies to different questions.

    (‖Σ_q u_q‖² − Q) / (Q (Q − 1)), where u_q are the counts of all replies to question q, divided by their length.

    It depends neither on the number of questions nor on the number of replies, unlike distinct-n. Different replies to the same
    question do not lower it: a policy may be certain of each reply, as long as the replies differ between questions.

    Args:
        replies: token ids of the replies to each of Q questions; no token has a negative id.

    Returns:
        The mean in [0, 1]: 1 if all questions have the same replies, 0 if no two questions share a bigram. None with fewer than
        two questions.

    Example:
        >>> bigram_similarity([[(5, 6)], [(5, 6)]]), bigram_similarity([[(5, 6)], [(7, 8)]])
        (1.0, 0.0)
    """
    if len(replies) < 2:
        return None
    total: dict[tuple[int, int], float] = {}
    has_text = 0
    for group in replies:
        counts = Counter(bigram for ids in group for bigram in pairwise((START, *ids)))
        length = math.sqrt(sum(count * count for count in counts.values()))
        has_text += bool(counts)
        for bigram, count in counts.items():
            total[bigram] = total.get(bigram, 0.0) + count / length
    shared = sum(weight * weight for weight in total.values()) - has_text
    # Rounding may leave it slightly outside.
    return min(1.0, max(0.0, shared / (len(replies) * (len(replies) - 1))))
