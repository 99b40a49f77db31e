"""Distance of a question to the domain of the seeds: how far the nearest seed is, compared with the seeds among themselves.

Shapes: S seeds, N texts, D dimensions; distances are 1 − cosine, in [0, 2].

Only the seeds define the domain. Accepted questions do not extend it, so a chain of questions, each a little farther away than
the one before, cannot leave it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.embeddings import Vectors

__all__ = ["FEWEST_SEEDS", "Nearest", "SeedDomain", "leave_one_out_distances"]

FEWEST_SEEDS = 5
"""Minimum number of seeds from which a threshold is computed."""

_ALPHA = 0.02
"""Target share of questions of the domain beyond the threshold before the margin."""

_FEWEST_IN_GROUP = 16
"""Minimum size of a group of which a limited share is dropped. Of one text, half is none, and nothing would be dropped."""

_BLOCK = 4096
"""Rows per matrix of distances."""


class Nearest(NamedTuple):
    """The nearest seed of a text.

    Attributes:
        distance: 1 − cosine.
        seed: number of the seed, from 0.
    """

    distance: float
    seed: int


@dataclass(frozen=True)
class SeedDomain:
    """The seeds as a domain with a border.

    Attributes:
        seeds: vectors of the seeds, `[S, D]`, of length 1.
        threshold: distance to the nearest seed above which a text is outside the domain.
    """

    seeds: Vectors
    threshold: float

    @classmethod
    def of(cls, seeds: Vectors, margin: float = 1.5, distances: NDArray[np.float64] | None = None) -> SeedDomain:
        """Compute the threshold from the leave-one-out distances of the seeds.

        With d_i the distance of seed i to the nearest other seed, and d_(k) the k-th smallest,

            threshold = margin · d_(k),    k = min(S, ⌈(1 − α)(S + 1)⌉),    α = 0.02

        A new question of the same distribution is as likely to have any rank among the d_i, except that it has one more seed to
        be near to. So without a margin at most a share max(α, 1 / (S + 1)) is beyond d_(k), as in conformal outlier detection
        (Bates et al. 2023, https://arxiv.org/abs/2104.08279). With 20 seeds that is one question in 21, and no rank can promise
        less, so the margin extends the border beyond the farthest seed.

        Args:
            seeds: `[S, D]`, of length 1, S >= 5.
            margin: factor of the threshold, >= 1. Default: 1.5.
            distances: Optional. Leave-one-out distances of the seeds, if they are known. Default: computed.

        Raises:
            ValueError: there are too few seeds, or the margin is below 1.
        """
        if len(seeds) < FEWEST_SEEDS:
            raise ValueError(f"a domain needs at least {FEWEST_SEEDS} seeds, got {len(seeds)}")
        if margin < 1:
            raise ValueError(f"margin must be at least 1, got {margin}")
        ranked = np.sort(leave_one_out_distances(seeds) if distances is None else distances)
        rank = min(len(seeds), math.ceil((1 - _ALPHA) * (len(seeds) + 1)))
        return cls(seeds, margin * float(ranked[rank - 1]))

    def nearest(self, vectors: Vectors) -> list[Nearest]:
        """Return the nearest seed of each text.

        Args:
            vectors: `[N, D]`, of length 1.
        """
        distances = _distances(vectors, self.seeds)
        found = distances.argmin(axis=1)
        return [Nearest(float(row[seed]), int(seed)) for row, seed in zip(distances, found, strict=True)]

    def border(self, distances: NDArray[np.float64], most: float = 0.5) -> float:
        """Return the distance above which texts of one group are dropped, so that these are at most a share of the group.

        A group of fewer than 16 texts has no limit: chance alone may put most of so few outside. If most of a larger group are
        outside, the seeds are no sample of what the model writes, and the threshold means nothing. Then only the farthest texts
        are dropped.

        Args:
            distances: distance of each text of the group, `[N]`.
            most: maximum share to drop. Default: 0.5.
        """
        if len(distances) < _FEWEST_IN_GROUP:
            return self.threshold
        kept = len(distances) - int(most * len(distances))
        return max(self.threshold, float(np.sort(distances)[kept - 1]))


def leave_one_out_distances(vectors: Vectors) -> NDArray[np.float64]:
    """Return the distance of each text to the nearest other text, `[N]`.

    Args:
        vectors: `[N, D]`, of length 1, N > 1.
    """
    parts = []
    for start in range(0, len(vectors), _BLOCK):
        distances = _distances(vectors[start : start + _BLOCK], vectors)
        rows = np.arange(len(distances))
        distances[rows, start + rows] = np.inf
        parts.append(distances.min(axis=1))
    return np.concatenate(parts).astype(np.float64)


def _distances(vectors: Vectors, others: Vectors) -> NDArray[np.float32]:
    """Return 1 − cosine of each pair, not negative: that of two equal vectors may be, by rounding."""
    distances: NDArray[np.float32] = np.maximum(1.0 - vectors @ others.T, 0.0)
    return distances
