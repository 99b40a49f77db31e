"""Do texts vary, or does one phrase come again and again?"""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.quality.dedupe import units

__all__ = ["distinct_n"]


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Measure the share of n-grams that are distinct, over all texts together: |set of n-grams| / number of n-grams.

    It falls as texts are added (words recur), so compare only collections of about the same size. Li et al. 2016,
    section 5 (https://arxiv.org/abs/1510.03055).

    Args:
        texts: the collection; case and punctuation are folded, and scripts without spaces count characters.
        n: units per n-gram, > 0.

    Returns:
        In (0, 1], 1 = nothing repeats; None when no text has n units.

    Raises:
        ValueError: n is not positive.

    Example:
        >>> distinct_n(["A cat sat.", "a cat ran"], 2)
        0.75
    """
    if n <= 0:
        raise ValueError(f"n must be positive, got {n}")
    parts = [units(text) for text in texts]
    grams = [tuple(part[i : i + n]) for part in parts for i in range(len(part) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
