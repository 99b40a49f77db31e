"""How central texts are among others.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.embeddings import Vectors

__all__ = ["densities"]

_BLOCK = 4096
"""Rows per matrix of similarities."""


def densities(vectors_ND: Vectors) -> NDArray[np.float64]:
    """Compute the density at each text, its mean similarity to all texts, itself included.

    d_i = 1/N Σ_j max(0, x_i · x_j)

    The information density of Settles and Craven 2008 (https://aclanthology.org/D08-1112).

    Args:
        vectors_ND: vectors of length 1.

    Returns:
        [N], in [1 / N, 1]; 0 for a vector of zeros.

    Example:
        >>> densities(np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)).round(2).tolist()
        [0.67, 0.67, 0.33]
    """
    parts = [
        np.maximum(vectors_ND[start : start + _BLOCK] @ vectors_ND.T, 0).mean(1, dtype=np.float64)
        for start in range(0, len(vectors_ND), _BLOCK)
    ]
    return np.concatenate(parts) if parts else np.empty(0)
