"""Degenerate repetition: replies that repeat one block of tokens until the token limit cuts them off.

Holtzman et al. 2020 (https://arxiv.org/abs/1904.09751) describe such loops; beam search and low temperatures cause
most of them.

The detector is a filter, so it prefers precision. Only the end of a reply that was cut off counts: a model that ends its reply
has left the repetition, which the question may have requested (a refrain, a row of zeros). Copies are exact, so a list
that counts up, a table and code with similar lines are no loops. `judging/loops.py` is less strict: it only explains why an
output of the judge has no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Loop", "find_loop"]

_COPIES = 4
"""Minimum number of copies of the block; lists often have three items that begin alike."""
_TOKENS = 24
"""Minimum number of tokens that the copies cover: the rule of a table and a row of dots are shorter."""
_SHARE = 0.4
"""Minimum share of the reply that the copies cover: below it, most of the reply was written before the loop."""


class Loop(NamedTuple):
    """The repeated end of a reply.

    Attributes:
        block: number of tokens of the shortest block that is repeated.
        tokens: number of tokens that its copies cover; the first or last copy may be incomplete.
    """

    block: int
    tokens: int


def find_loop(ids: Sequence[int], *, finished: bool) -> Loop | None:
    """Find the block of tokens that the end of a reply repeats until the token limit.

    Let the last m(p) tokens each equal the token p places before them. The copies of a block of p tokens cover p + m(p) tokens.
    They are a loop if they are at least four blocks, 24 tokens and 40 % of the reply.

    Args:
        ids: token ids of the reply, `[T]`.
        finished: whether the reply ended before the token limit; then it is no loop.

    Returns:
        The loop with the shortest block, or None.

    Example:
        >>> find_loop([5, 6, *[7, 8, 9] * 9], finished=False)
        Loop(block=3, tokens=27)
        >>> find_loop([7, 8, 9] * 9, finished=True), find_loop(range(100), finished=False)
        (None, None)
    """
    if finished or len(ids) < _TOKENS:
        return None
    backwards = tuple(reversed(ids))
    matches = _prefix_matches(backwards)
    for block in range(1, len(ids) // _COPIES + 1):
        covered = block + matches[block]
        if covered >= max(_COPIES * block, _TOKENS, _SHARE * len(ids)):
            return Loop(block, covered)
    return None


def _prefix_matches(ids: Sequence[int]) -> list[int]:
    """Return, for each position, how many tokens from there equal those from the start: the Z-function, in linear time.

    Gusfield 1997, Algorithms on Strings, Trees and Sequences, section 1.4.
    """
    found = [len(ids)] + [0] * (len(ids) - 1)
    left = right = 0
    for i in range(1, len(ids)):
        length = min(right - i, found[i - left]) if i < right else 0
        while i + length < len(ids) and ids[length] == ids[i + length]:
            length += 1
        found[i] = length
        if i + length > right:
            left, right = i, i + length
    return found
