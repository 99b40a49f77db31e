"""The order in which training pairs are presented to an evaluator, computed from the seed and the epoch alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["epoch_length", "epoch_order"]


def epoch_length(excess: Sequence[int], *, balanced: bool) -> int:
    """Return the number of pairs that `epoch_order` presents per epoch.

    Args:
        excess: length of the chosen reply minus length of the rejected one, per pair.
        balanced: as in `epoch_order`.
    """
    longer, shorter, equal = _by_length(excess)
    if not (balanced and longer and shorter):
        return len(excess)
    return 2 * max(len(longer), len(shorter)) + len(equal)


def epoch_order(excess: Sequence[int], *, seed: str, balanced: bool) -> list[int]:
    """Return the indices of the pairs of an epoch, shuffled.

    With `balanced`, pairs whose chosen reply is the longer one alternate with pairs whose chosen reply is the shorter one, so
    their numbers in a batch differ by one at most. The smaller group is repeated in whole passes and the beginning of another.
    Preferring long replies then lowers the loss no more than preferring short ones; reward models that are trained on
    unbalanced preferences learn the length (Singhal et al. 2023, https://arxiv.org/abs/2310.03716). If only longer replies are
    chosen, or only shorter ones, the order is the plain one.

    Args:
        excess: length of the chosen reply minus length of the rejected one, per pair.
        seed: seed of the shuffle; includes the epoch.
        balanced: whether lengths are balanced.
    """
    rng = random.Random(seed)
    longer, shorter, equal = _by_length(excess)
    if not (balanced and longer and shorter):
        order = list(range(len(excess)))
        rng.shuffle(order)
        return order
    size = max(len(longer), len(shorter))
    groups = [_repeated(group, size, rng) for group in (longer, shorter)]
    order = [index for both in zip(*groups, strict=True) for index in both]
    for index in equal:
        order.insert(rng.randrange(len(order) + 1), index)
    return order


def _by_length(excess: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of the pairs whose chosen reply is longer, shorter, and of equal length."""
    longer, shorter, equal = ([i for i, e in enumerate(excess) if (e > 0) - (e < 0) == sign] for sign in (1, -1, 0))
    return longer, shorter, equal


def _repeated(group: Sequence[int], size: int, rng: random.Random) -> list[int]:
    """Return `size` indices: whole shuffled passes over the group, and the beginning of another."""
    found: list[int] = []
    while len(found) < size:
        found += rng.sample(group, min(len(group), size - len(found)))
    return found
