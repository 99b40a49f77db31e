"""The Vendi score: the effective number of distinct texts, from their vectors.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import numpy as np

from selfeval.quality.embeddings import Vectors

__all__ = ["vendi_score"]


def vendi_score(vectors: Vectors) -> float | None:
    """Compute the Vendi score, the exponential of the entropy of the eigenvalues λ of K / N with K = X Xᵀ.

    exp(− Σ λ_i log λ_i). Friedman and Dieng 2022, definition 3.1 (https://arxiv.org/abs/2210.02410).

    It increases with the number of texts; compare only collections of equal size. K / N and Xᵀ X / N have the same positive
    eigenvalues, and the smaller of the two matrices is decomposed.

    Args:
        vectors: `[N, D]`, rows of length 1. Rows of zeros are texts without any content, which are equal to each other.

    Returns:
        The score in [1, N]: 1 if all texts are equal, N if all vectors are orthogonal. None without texts.

    Raises:
        ValueError: a row has neither length 1 nor length 0.

    Example:
        >>> vendi_score(np.eye(4, dtype=np.float32)), vendi_score(np.ones((5, 1), dtype=np.float32))
        (4.0, 1.0)
    """
    if not len(vectors):
        return None
    x_ND = _with_empty_texts(vectors.astype(np.float64))
    matrix = x_ND @ x_ND.T if len(x_ND) < x_ND.shape[1] else x_ND.T @ x_ND
    eigenvalues = np.linalg.eigvalsh(matrix / len(x_ND))
    # Rounding leaves zeros slightly negative; 0 log 0 = 0.
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _with_empty_texts(x_ND: np.ndarray) -> np.ndarray:
    """Add a dimension in which the rows of zeros are 1, which makes the trace of K / N equal to 1."""
    lengths_N = np.linalg.norm(x_ND, axis=1)
    if not np.all((abs(lengths_N - 1) < 1e-3) | (lengths_N == 0)):
        raise ValueError(f"vectors must have length 1 or 0, got lengths from {lengths_N.min():.4g} to {lengths_N.max():.4g}")
    return np.hstack([x_ND, (lengths_N == 0)[:, None].astype(np.float64)])
