"""Stateless schedules of the learning rate and of the data order: they depend on the step alone, so resuming is exact."""

from __future__ import annotations

import random

__all__ = ["draw", "warmup_and_decay"]


def warmup_and_decay(step: int, steps: int, warmup: float) -> float:
    """Compute the multiplier of the learning rate: linear warm-up to 1, then linear decay towards 0.

        min((step + 1) / w, (steps - step) / (steps - w)),   w = warmup * steps, rounded, at least 1

    Args:
        step: from 0; below `steps`.
        steps: number of steps.
        warmup: share of the steps used for warm-up, in [0, 1].

    Example:
        >>> [warmup_and_decay(step, 6, 1 / 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rising = max(1, round(steps * warmup))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def draw(count: int, step: int, batch: int, seed: str) -> list[int]:
    """Return the row indices of a step. Rows are reshuffled in every pass, and a batch may span two passes.

    Args:
        count: number of rows.
        step: from 0.
        batch: rows per step.
        seed: the shuffle of pass n is seeded with `seed/n`.
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
