"""Centring and whitening of vectors, so that a dot product is not dominated by a few directions that all texts share.

Shapes: N texts, D dimensions, K kept components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.embeddings.protocol import Vectors

__all__ = ["Whitening", "fit_whitening"]

_PRIOR_TEXTS = 64
"""The shrinkage is at least that of so many texts with equal variance in all directions. With fewer texts than dimensions, the
estimate of Ledoit and Wolf makes the texts of the corpus orthogonal to each other, paraphrases too."""

_FLOOR = 1e-6
"""Smallest variance of a direction, as a share of the mean one. Below it, whitening would amplify rounding errors."""


@dataclass(frozen=True)
class Whitening:
    """An affine map to vectors whose covariance is the identity.

    Attributes:
        mean_D: the mean that is subtracted.
        components_KD: orthonormal directions, by descending variance.
        scales_K: factor of each direction, 1 / its standard deviation.
        rest: factor of the directions orthogonal to all components; None if these are dropped.
    """

    mean_D: NDArray[np.float64]
    components_KD: NDArray[np.float64]
    scales_K: NDArray[np.float64]
    rest: float | None

    def apply(self, vectors_ND: Vectors) -> Vectors:
        """Return the whitened vectors: `[N, K]`, or `[N, D]` if the orthogonal directions are kept."""
        centred_ND = vectors_ND.astype(np.float64) - self.mean_D
        along_NK = centred_ND @ self.components_KD.T
        if self.rest is None:
            return (along_NK * self.scales_K).astype(np.float32)
        # ZCA: back in the original axes, where no choice of a basis for equal variances is left.
        within_ND = (along_NK * (self.scales_K - self.rest)) @ self.components_KD
        return (within_ND + self.rest * centred_ND).astype(np.float32)


def fit_whitening(vectors_ND: Vectors, dimensions: int | None = None, shrinkage: float | None = None) -> Whitening:
    """Fit a whitening to the vectors of a corpus.

    y = S^(-1/2) (x - m), with the shrunk covariance S = (1 - r) C + r (tr C / D) I. The shrinkage r keeps S invertible if there
    are fewer texts than dimensions. Su et al. 2021 (https://arxiv.org/abs/2103.15316); Ledoit and Wolf 2004
    (https://doi.org/10.1016/S0047-259X(03)00096-4).

    Args:
        vectors_ND: N >= 0 vectors. With none or one, or if all are equal, nothing is known about the variance, and it is not
            changed.
        dimensions: Optional. Number of components to keep, those with the largest variance. All D are kept if the corpus has no
            more texts than this, because it then does not say which directions matter. Default: all.
        shrinkage: Optional. r in [0, 1]. Default: the estimate of Ledoit and Wolf, at least 64 / (N + 64).

    Returns:
        The map. Up to a rotation, it is the same for all orders of the corpus.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    count, width = vectors_ND.shape
    mean_D = vectors_ND.astype(np.float64).mean(0) if count else np.zeros(width)
    centred_ND = vectors_ND.astype(np.float64) - mean_D
    typical = float((centred_ND**2).sum() / max(1, count) / max(1, width))
    if typical == 0:
        return Whitening(mean_D, np.zeros((0, width)), np.zeros(0), rest=1.0)
    if shrinkage is None:
        estimate = float(ledoit_wolf_shrinkage(centred_ND, assume_centered=True))
        shrinkage = max(estimate, _PRIOR_TEXTS / (count + _PRIOR_TEXTS))
    _, singular_R, components_RD = np.linalg.svd(centred_ND, full_matrices=False)
    variances_R = np.maximum((1 - shrinkage) * singular_R**2 / count + shrinkage * typical, _FLOOR * typical)
    rest = max(shrinkage, _FLOOR) * typical
    if dimensions is not None and dimensions < min(count, width):
        return Whitening(mean_D, components_RD[:dimensions], variances_R[:dimensions] ** -0.5, rest=None)
    return Whitening(mean_D, components_RD, variances_R**-0.5, rest=rest**-0.5)
