"""Recognise an output that is stuck in a loop: its end repeats one block of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ends_in_loop"]

_REPEATS = 3
"""Fewest consecutive copies of the block."""
_SHORTEST = 16
"""Fewest tokens that the copies cover: a row of dots or a ruler is shorter and no loop."""


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Return whether the last tokens are at least three copies of one block, and at least 16 tokens.

    The copies are exact and the last one may be incomplete: for some block length p, each of the last max(3p, 16) tokens
    except the first p equals the token p places before it. A list that counts up is no loop.

    Args:
        ids: token ids of an output that was cut off, `[T]`.

    Example:
        >>> ends_in_loop([7, 8, 9] * 6), ends_in_loop([7, 8, 9] * 5), ends_in_loop(range(100))
        (True, False, False)
    """
    return any(_repeats(ids, block) for block in range(1, len(ids) // _REPEATS + 1))


def _repeats(ids: Sequence[int], block: int) -> bool:
    covered = max(_REPEATS * block, _SHORTEST)
    return covered <= len(ids) and all(ids[-i] == ids[-i - block] for i in range(1, covered - block + 1))
