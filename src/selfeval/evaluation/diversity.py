"""Diversity of the replies before and after training, each as one figure of all replies together.

Shapes: N questions, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfeval.quality.embeddings import Vectors
from selfeval.quality.jackknife import Bounds, Kept, jackknife
from selfeval.quality.ngram_counts import TextCounts, count_ngrams, distinct_share, self_bleu
from selfeval.quality.vendi import vendi_score
from selfeval.report.schema import Diversity, DiversityChange

__all__ = ["MOST_QUESTIONS", "ReplyVectors", "compare_diversity"]

MOST_QUESTIONS = 1000
"""Questions whose replies are compared at most; the first ones."""


@dataclass(frozen=True)
class ReplyVectors:
    """Vectors of the replies before and after training, `[N, D]` each, by the same embedder."""

    embedder: str
    before: Vectors
    after: Vectors


def compare_diversity(before: Sequence[str], after: Sequence[str], vectors: ReplyVectors | None = None) -> Diversity | None:
    """Compare the diversity of the replies before and after training, on the same questions.

    Args:
        before, after: texts of N replies, in the order of their questions. At most `MOST_QUESTIONS` are used.
        vectors: Optional. Vectors of these replies. Default: no Vendi score.

    Returns:
        The figures; None with fewer than two questions.
    """
    if len(before) < 2:
        return None
    n = min(len(before), MOST_QUESTIONS)
    counts = [count_ngrams(texts[:n]) for texts in (before, after)]
    return Diversity(
        questions=n,
        distinct_1=_change(counts, lambda of, kept: distinct_share(of, 1, kept), n),
        distinct_2=_change(counts, lambda of, kept: distinct_share(of, 2, kept), n),
        self_bleu=_change(counts, self_bleu, n),
        vendi=_vendi(vectors, n),
        embedder=vectors.embedder if vectors else None,
    )


def _change(sides: Sequence[TextCounts], measure: Callable[[TextCounts, Kept], float], n: int) -> DiversityChange:
    return _compare(lambda kept: [measure(side, kept) for side in sides], n, (0.0, 1.0))


def _vendi(vectors: ReplyVectors | None, n: int) -> DiversityChange | None:
    if vectors is None:
        return None
    sides = vectors.before[:n], vectors.after[:n]
    return _compare(lambda kept: [_score(side[kept]) for side in sides], n, (1.0, float(n)))


def _compare(measure: Callable[[Kept], Sequence[float]], n: int, bounds: Bounds) -> DiversityChange:
    """Compare a measure of both sides, whose values are in `bounds`."""

    def statistics(kept: Kept) -> list[float]:
        first, second = measure(kept)
        return [first, second, second - first]

    reach = bounds[1] - bounds[0]
    before, after, change = jackknife(statistics, n, bounds=[bounds, bounds, (-reach, reach)])
    return DiversityChange(before=before, after=after, change=change)


def _score(vectors: Vectors) -> float:
    found = vendi_score(vectors)
    return math.nan if found is None else found
