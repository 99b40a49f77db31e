"""Corpus scores from statistics of lines, their bootstrap intervals, and paired differences between two systems.

A corpus score such as BLEU is not a mean of sentence scores, but a function of sums over lines: matches, lengths, edits. Each
resample sums the statistics of the drawn lines, so no text is compared twice. Koehn 2004
(https://aclanthology.org/W04-3250).

Shapes: N lines, S statistics per line, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.statistics import Figure, bootstrap_interval

__all__ = ["FEWEST_LINES", "Floats", "LineStatistics", "corpus_difference", "corpus_figure", "mean_of"]

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

FEWEST_LINES = 10
"""Fewest lines for an interval: resamples of fewer lines are too much alike."""


@dataclass(frozen=True)
class LineStatistics:
    """A metric on all lines.

    Attributes:
        lines_NS: statistics that are summed over lines.
        sentences: score of each line alone.
        score: maps the sums `[S]` to the corpus score.
    """

    lines_NS: Floats
    sentences: tuple[float, ...]
    score: Callable[[Floats], float]

    @property
    def value(self) -> float:
        """The corpus score."""
        return self.score(self.lines_NS.sum(axis=0))

    def resampled(self, indices_RN: Indices) -> Floats:
        """Return `[R]`, the corpus score of each resample."""
        r, n = indices_RN.shape
        # How often each line was drawn: a product of small matrices instead of R copies of the statistics.
        flat = (indices_RN + np.arange(r)[:, None] * n).ravel()
        drawn_RN = np.bincount(flat, minlength=r * n).reshape(r, n)
        return np.array([self.score(sums_S) for sums_S in drawn_RN @ self.lines_NS])


def mean_of(values: list[float]) -> LineStatistics:
    """Return the statistics of a metric whose corpus score is the mean of its sentence scores."""
    lines_NS = np.array([[value, 1.0] for value in values])
    return LineStatistics(lines_NS, tuple(values), lambda sums_S: float(sums_S[0] / sums_S[1]))


def corpus_figure(found: LineStatistics, seed: int, resamples: int) -> Figure:
    """Return the corpus score with a 95 % percentile bootstrap interval over lines; none below `FEWEST_LINES` lines."""
    n = len(found.lines_NS)
    if n < FEWEST_LINES:
        return Figure(found.value, None, None, n)
    return Figure(found.value, *bootstrap_interval(found.resampled, n, seed=seed, resamples=resamples), n)


def corpus_difference(ours: LineStatistics, theirs: LineStatistics, seed: int, resamples: int) -> Figure:
    """Return our corpus score minus theirs on the same lines, with a paired bootstrap interval: both draw the same lines."""
    n, difference = len(ours.lines_NS), ours.value - theirs.value
    if n < FEWEST_LINES:
        return Figure(difference, None, None, n)

    def resampled(indices_RN: Indices) -> Floats:
        return ours.resampled(indices_RN) - theirs.resampled(indices_RN)

    return Figure(difference, *bootstrap_interval(resampled, n, seed=seed, resamples=resamples), n)
