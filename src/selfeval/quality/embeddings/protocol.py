"""The protocol of embedders, and the vectors that they return.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Embedder", "Vectors", "unit_rows"]

Vectors: TypeAlias = NDArray[np.float32]
"""`[N, D]`, one row per text."""


class Embedder(Protocol):
    """Maps texts to vectors whose dot product is their similarity.

    Vectors of two embedders with the same name are equal for the same text, up to rounding; the name is part of the key under
    which vectors are cached.
    """

    @property
    def name(self) -> str:
        """Identifier of the model and the settings, such as `backbone-1a2b3c4d-layer4-mean`."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return `[N, D]` vectors of length 1; a text without any content has a row of zeros.

        Args:
            texts: N texts in any language.
        """
        ...


def unit_rows(vectors: Vectors) -> Vectors:
    """Scale each row to length 1, x / ||x||; rows of zeros stay zeros.

    Args:
        vectors: `[N, D]`.

    Returns:
        `[N, D]`, in fp32.

    Example:
        >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32)).round(1).tolist()
        [[0.6, 0.8], [0.0, 0.0]]
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    found: Vectors = (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return found
