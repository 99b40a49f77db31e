"""Diversity of a collection of texts."""

from __future__ import annotations

from collections.abc import Sequence

from selfeval.quality.dedupe import units

__all__ = ["distinct_n", "distinct_share_of_units"]


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Compute distinct-n: the number of distinct n-grams over the number of n-grams, in all texts together.

    It decreases with the size of the collection, because words recur; compare only collections of similar size. Li et al. 2016,
    section 5 (https://arxiv.org/abs/1510.03055).

    Args:
        texts: the collection; case and punctuation are folded, and scripts without spaces are split into characters.
        n: number of units per n-gram, > 0.

    Returns:
        The share in (0, 1]; 1 means that no n-gram repeats. None if no text has n units.

    Raises:
        ValueError: n is not positive.

    Example:
        >>> distinct_n(["A cat sat.", "a cat ran"], 2)
        0.75
    """
    return distinct_share_of_units([units(text) for text in texts], n)


def distinct_share_of_units(parts: Sequence[Sequence[str]], n: int) -> float | None:
    """Compute `distinct_n` of texts that are split into units already.

    Args:
        parts: the units of each text.
        n: number of units per n-gram, > 0.

    Raises:
        ValueError: n is not positive.

    Example:
        >>> distinct_share_of_units([["a", "b"], ["a", "c"]], 1)
        0.75
    """
    if n <= 0:
        raise ValueError(f"n must be positive, got {n}")
    grams = [tuple(part[i : i + n]) for part in parts for i in range(len(part) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
