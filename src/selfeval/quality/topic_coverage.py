"""Coverage of topics: draw examples from topics that few questions are about.

A model that sees examples writes questions like them. Examples drawn uniformly reproduce the topics in the proportion in which
they were written, so frequent topics stay frequent. Here questions are clustered, and each cluster is shown equally often.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.embeddings import Vectors
from selfeval.quality.k_means import k_means

__all__ = ["cluster_topics", "draw_weighted", "thin_cluster_weights"]

T = TypeVar("T")

_MOST_CLUSTERS = 64
_PASSES = 25


def cluster_topics(vectors: Vectors, seed: int, clusters: int | None = None) -> NDArray[np.int64]:
    """Cluster texts by topic: k-means on vectors of length 1.

    Args:
        vectors: `[N, D]`, of length 1.
        seed: seed of the initial centres, >= 0.
        clusters: Optional. Number of clusters, > 0. Default: √(N / 2), at most 64 (Mardia et al. 1979, p. 365).

    Returns:
        Number of the cluster of each text, `[N]`.
    """
    if not len(vectors):
        return np.zeros(0, dtype=np.int64)
    number = clusters or min(_MOST_CLUSTERS, round(math.sqrt(len(vectors) / 2)))
    number = min(max(1, number), len(np.unique(vectors, axis=0)))
    return k_means(vectors, number, seed=seed % 2**32, starts=1, passes=_PASSES)


def thin_cluster_weights(clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return weights with which each cluster is drawn equally often, 1 / (K · size of the text's cluster); they sum to 1.

    Args:
        clusters: number of the cluster of each text, `[N]`.

    Example:
        >>> thin_cluster_weights(np.array([0, 0, 0, 1])).round(3).tolist()
        [0.167, 0.167, 0.167, 0.5]
    """
    _, place, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    weights: NDArray[np.float64] = 1.0 / (len(sizes) * sizes[place])
    return weights


def draw_weighted(rng: random.Random, items: Sequence[T], weights: Sequence[float], count: int) -> list[T]:
    """Draw distinct items one after another, each with a probability proportional to its weight among those that are left.

    The items with the largest keys log(u) / w, u uniform in (0, 1], are such a draw. Efraimidis and Spirakis 2006
    (https://doi.org/10.1016/j.ipl.2005.11.003), algorithm A.

    Args:
        rng: generator of the random numbers.
        items: N items.
        weights: N weights, > 0.
        count: number of items to draw, 0 to N.

    Returns:
        The items in the order in which they are drawn.

    Raises:
        ValueError: there are fewer items than `count`, or a weight is not positive.
    """
    if not 0 <= count <= len(items):
        raise ValueError(f"count must be 0 to {len(items)}, got {count}")
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"weights must be positive, got {min(weights)}")
    # random() may be 0 and is never 1.
    keys = [math.log(1.0 - rng.random()) / weight for weight in weights]
    largest = sorted(range(len(items)), key=lambda i: keys[i], reverse=True)
    return [items[i] for i in largest[:count]]
