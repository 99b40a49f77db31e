"""Which questions to recommend as new seeds: different ones, in the regions where the evaluator is least certain.

Shapes: N measured questions, M candidates, S seeds, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.embeddings import Vectors
from selfeval.quality.statistics import finite

__all__ = ["expected_uncertainty", "farthest_first", "spread_margin_temperature"]

Floats = NDArray[np.float64]

_BLOCK = 4096
"""Candidates per matrix of similarities."""


def spread_margin_temperature(temperature: float, disagreement: float) -> float:
    """Compute the temperature of the confidence in a margin that the members of an ensemble disagree about.

    sigmoid(m / √(T² + π s² / 8)) approximates the mean of sigmoid(x / T) over x ~ N(m, s²): MacKay 1992
    (https://doi.org/10.1162/neco.1992.4.5.720), section 3.

    Args:
        temperature: temperature T of the confidence, > 0.
        disagreement: standard deviation s of the margin over the members, >= 0.

    Example:
        >>> spread_margin_temperature(2.0, 0.0)
        2.0
    """
    return float(np.sqrt(temperature**2 + np.pi * disagreement**2 / 8))


def expected_uncertainty(
    candidates_MD: Vectors, measured_ND: Vectors, uncertainties: Sequence[float], neighbours: int = 10
) -> Floats:
    """Estimate the evaluator's uncertainty on questions from that on the nearest measured ones, weighted by similarity.

    u_i = Σ_j s_ij u_j / Σ_j s_ij over the nearest neighbours j, with s_ij = max(x_i · y_j, ε)

    Args:
        candidates_MD: vectors of length 1.
        measured_ND: vectors of length 1; N > 0.
        uncertainties: [N], of the measured questions.
        neighbours: maximum number of neighbours, > 0. Default: 10.

    Returns:
        [M].

    Raises:
        ValueError: there are no measured questions, their numbers differ, or a number is not finite.
    """
    u_N = finite(uncertainties, "uncertainties")
    if not len(measured_ND) == u_N.size > 0 or neighbours <= 0:
        raise ValueError(f"got {len(measured_ND)} vectors, {u_N.size} uncertainties and {neighbours} neighbours")
    parts = [
        _weighted(candidates_MD[start : start + _BLOCK] @ measured_ND.T, u_N, min(neighbours, u_N.size))
        for start in range(0, len(candidates_MD), _BLOCK)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def _weighted(similarities_BN: Vectors, u_N: Floats, neighbours: int) -> Floats:
    nearest_BK = np.argpartition(-similarities_BN, neighbours - 1, axis=1)[:, :neighbours]
    # A floor: neighbours on the other side of the origin would have negative weights.
    weights_BK = np.maximum(np.take_along_axis(similarities_BN, nearest_BK, axis=1).astype(np.float64), 1e-6)
    return np.asarray((weights_BK * u_N[nearest_BK]).sum(1) / weights_BK.sum(1), dtype=np.float64)


def farthest_first(candidates_MD: Vectors, weights: Sequence[float], count: int, known_SD: Vectors | None = None) -> list[int]:
    """Choose candidates one by one: each has the largest product of its weight and its distance to the nearest chosen one.

    w_i (1 − max_j x_i · x_j). With equal weights this is farthest-first traversal: Gonzalez 1985
    (https://doi.org/10.1016/0304-3975(85)90224-5).

    Args:
        candidates_MD: vectors of length 1.
        weights: [M], >= 0.
        count: number of candidates to choose.
        known_SD: Optional. Vectors that count as chosen, such as those of the seeds. Default: none.

    Returns:
        Rows of the candidates in the order of the choice; fewer if no other one has a positive product.

    Raises:
        ValueError: the numbers of vectors and weights differ, or a weight is negative or not finite.

    Example:
        >>> farthest_first(np.eye(3, dtype=np.float32)[[0, 0, 1, 2]], [0.5, 0.4, 0.3, 0.1], 3)
        [0, 2, 3]
    """
    w_M = finite(weights, "weights")
    if len(candidates_MD) != w_M.size or (w_M.size and w_M.min() < 0):
        raise ValueError(f"got {len(candidates_MD)} vectors and {w_M.size} weights; weights must be at least 0")
    distances_M = np.ones(w_M.size)
    for known_D in () if known_SD is None else known_SD:
        distances_M = _nearer(distances_M, candidates_MD, known_D)
    chosen: list[int] = []
    while len(chosen) < min(count, w_M.size):
        best = int(np.argmax(w_M * distances_M))
        # Equal vectors have a distance of a rounding error.
        if w_M[best] * distances_M[best] <= 1e-6 * w_M[best]:
            break
        chosen.append(best)
        distances_M = _nearer(distances_M, candidates_MD, candidates_MD[best])
    return chosen


def _nearer(distances_M: Floats, candidates_MD: Vectors, chosen_D: NDArray[np.float32]) -> Floats:
    return np.minimum(distances_M, np.maximum(0.0, 1.0 - (candidates_MD @ chosen_D).astype(np.float64)))
