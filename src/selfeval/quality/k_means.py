"""k-means with one thread. Several add the terms of the centres in any order, so a resumed run could get other clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["k_means"]


def k_means(
    vectors: NDArray[np.floating[Any]], clusters: int, *, seed: int, starts: int, passes: int = 300
) -> NDArray[np.int64]:
    """Cluster vectors by k-means (scikit-learn).

    Args:
        vectors: `[N, D]`.
        clusters: number of clusters, at most that of different vectors.
        seed: seed of the initial centres, in [0, 2^32).
        starts: initial centres that are tried; those with the smallest sum of squares win.
        passes: maximum number of passes. Default: 300.

    Returns:
        Number of the cluster of each vector, `[N]`.
    """
    from sklearn.cluster import KMeans  # lazy: takes a second to import
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        found = KMeans(clusters, n_init=starts, max_iter=passes, random_state=seed).fit_predict(vectors)
    return np.asarray(found, dtype=np.int64)
