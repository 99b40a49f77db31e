"""The size of a pass without gradients on a CPU, by what is fastest on this machine.

The activations of a large pass do not fit the caches of a CPU, and a small pass costs more per token in calls. The best size
depends on the model and on the machine, so a few sizes are timed once, on rows of equal length through the bare model.

The size decides in which order sums are computed, so the last bits of results depend on it. A run records its size and
continues with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from selfeval.backbone.adapters import BASE
from selfeval.backbone.budget import CPU_PASS_TOKENS
from selfeval.backbone.roles import Backbone

__all__ = ["fastest_size", "measures_passes", "pick_pass_tokens"]

_SIZES = (1024, 2048, CPU_PASS_TOKENS)
"""Sizes that are timed. None is above the default, so that a measurement never raises the memory of a run."""
_WIDTH, _ROUNDS = 64, 2
_GAIN = 0.9
"""A smaller size must take at most this share of the time of the default; less would be noise."""
_MOST_SECONDS = 1.0
"""Largest CPU time of the smallest pass. A larger model would be measured for minutes."""


def measures_passes(backbone: Backbone) -> bool:
    """Return whether the size of passes can be measured: on a CPU, without a memory limit, which decides otherwise."""
    return backbone.loaded.device.type == "cpu" and backbone.budget.meter.limit is None


def pick_pass_tokens(backbone: Backbone, limit: int) -> int:
    """Return the maximum tokens of a pass without gradients on this machine, with the current number of threads.

    Args:
        backbone: backbone on a CPU.
        limit: largest size.

    Returns:
        The fastest of 1,024, 2,048 and 4,096 tokens, at most `limit`. It is the largest unless another one saves a tenth of the
        CPU time, and if a pass of 1,024 tokens takes more than a second.
    """
    sizes = [size for size in _SIZES if size <= limit]
    if len(sizes) < 2:
        return min(limit, CPU_PASS_TOKENS)
    with backbone.acting_as(BASE):
        passes = {size: partial(_seconds, backbone, size, sizes[-1]) for size in sizes}
        # The first pass also warms the caches and the allocator up.
        if _seconds(backbone, sizes[0], sizes[0]) > _MOST_SECONDS:
            return sizes[-1]
        return fastest_size(passes, _ROUNDS)


def fastest_size(seconds: Mapping[int, Callable[[], float]], rounds: int) -> int:
    """Return the size whose work takes the least time; the largest one unless another one saves a tenth.

    Args:
        seconds: for each size, in ascending order, a function that does the same work in passes of this size and returns its
            time.
        rounds: number of times that each is called. They take turns, and the shortest time counts, because other jobs only
            lengthen it.
    """
    found: dict[int, list[float]] = {size: [] for size in seconds}
    for _ in range(rounds):
        for size, work in seconds.items():
            found[size].append(work())
    shortest, largest = {size: min(times) for size, times in found.items()}, max(found)
    best = min(shortest, key=shortest.__getitem__)
    return best if shortest[best] <= _GAIN * shortest[largest] else largest


@torch.no_grad()
def _seconds(backbone: Backbone, size: int, tokens: int) -> float:
    """Return the CPU seconds of reading a number of tokens in passes of some size."""
    width = min(_WIDTH, backbone.loaded.context_length or _WIDTH)
    ids_BT = torch.zeros(max(1, size // width), width, dtype=torch.long, device=backbone.loaded.device)
    mask_BT = torch.ones_like(ids_BT)
    started = time.process_time()
    for _ in range(tokens // size):
        backbone.hidden(ids_BT, mask_BT)
    return time.process_time() - started
