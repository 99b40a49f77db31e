"""What changes from step to step, as functions of the step alone: the learning rate, and which rows are read."""

from __future__ import annotations

import random

__all__ = ["draw", "warmup_and_decay"]


def warmup_and_decay(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rate: rises in a line to 1, then falls in a line; the step after the last would have 0.

        min((step + 1) / w, (steps - step) / (steps - w)),   w = warmup * steps, rounded, at least 1

    Args:
        step: from 0; below `steps`.
        steps: how many there are.
        warmup: share of them in which it rises, in [0, 1].

    Example:
        >>> [warmup_and_decay(step, 6, 1 / 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rising = max(1, round(steps * warmup))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def draw(count: int, step: int, batch: int, seed: str) -> list[int]:
    """Indices of the rows of a step: pass after pass over all rows, each in an order of its own; a batch may span two passes.

    Args:
        count: rows there are.
        step: from 0.
        batch: rows of a step.
        seed: of the orders; pass n is shuffled with `seed/n`.
    """
    found = []
    orders: dict[int, list[int]] = {}
    for position in range(step * batch, (step + 1) * batch):
        turn, place = divmod(position, count)
        if turn not in orders:
            orders[turn] = list(range(count))
            random.Random(f"{seed}/{turn}").shuffle(orders[turn])
        found.append(orders[turn][place])
    return found
