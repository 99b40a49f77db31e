"""Diversity of the replies to the same question: a judge can only prefer one of two replies that differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from selfeval.quality.dedupe import jaccard, units
from selfeval.quality.diversity import distinct_share_of_units
from selfeval.quality.statistics import Figure, mean_figure

__all__ = ["ReplyDiversity", "measure_diversity"]


@dataclass(frozen=True)
class ReplyDiversity:
    """Means over the questions with at least two replies; `n` counts questions.

    Attributes:
        distinct_1, distinct_2: distinct n-grams of the replies to a question over all of their n-grams (Li et al. 2016,
            https://arxiv.org/abs/1510.03055); 1 / R for R equal replies without a repeated n-gram, 1 if no n-gram repeats.
        overlap: Jaccard similarity of the words of two replies, mean over all pairs of a question; 1 for equal replies.
        identical: share of the pairs of a question that are equal, except for case, punctuation and spaces.
    """

    distinct_1: Figure
    distinct_2: Figure
    overlap: Figure
    identical: Figure

    def means(self, digits: int = 4) -> dict[str, float]:
        """Return the means by name, without those that have no question."""
        found = {name: getattr(self, name).value for name in ("distinct_1", "distinct_2", "overlap", "identical")}
        return {name: round(value, digits) for name, value in found.items() if value is not None}


def measure_diversity(replies_of_questions: Iterable[Sequence[str]]) -> ReplyDiversity:
    """Measure how much the replies to the same question differ.

    Args:
        replies_of_questions: the texts of the replies, a sequence for each question. Questions with fewer than two are skipped.

    Returns:
        The figures; without any question, their values are None.

    Example:
        >>> measure_diversity([["It is red.", "It is blue."]]).means()
        {'distinct_1': 0.6667, 'distinct_2': 0.75, 'overlap': 0.5, 'identical': 0.0}
    """
    # The units of a text are the slow part, so they are computed once for all figures.
    groups = [[units(text) for text in texts] for texts in replies_of_questions if len(texts) > 1]
    pairs = [list(combinations(group, 2)) for group in groups]
    return ReplyDiversity(
        _mean(distinct_share_of_units(group, 1) for group in groups),
        _mean(distinct_share_of_units(group, 2) for group in groups),
        _mean(fmean(jaccard(frozenset(a), frozenset(b)) for a, b in found) for found in pairs),
        _mean(fmean(a == b for a, b in found) for found in pairs),
    )


def _mean(values: Iterable[float | None]) -> Figure:
    return mean_figure([value for value in values if value is not None])
