"""The number of CPU threads of a stage, by what is fastest at the moment.

The threads of a parallel region wait for each other at its end, and by default they wait actively. Where another process needs
the cores, one that is not scheduled keeps all others waiting, and two threads may be many times slower than one. A short piece
of work is therefore timed with each number of threads.

The number of threads decides in which order sums are computed, so the last bits of results depend on it. A stage keeps its
number when it is resumed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["cpu_threads", "is_set_by_user", "pick_threads", "usable_cores"]

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which users set the number of threads of torch."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TIMES, _STEPS = 4, 8
_GAIN = 0.8
"""Fewer threads must take at most this share of the time of more: threads save more in large models than in this work."""


def usable_cores(quota: Path = _QUOTA) -> int:
    """Return the number of cores that this process may use: its affinity, and the CPU quota of its control group.

    Args:
        quota: the file `cpu.max` of the control group (cgroup v2).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
        return affinity if allowed == "max" else max(1, min(affinity, math.ceil(int(allowed) / int(period))))
    except (OSError, ValueError):  # no control group, or its first version
        return affinity


def is_set_by_user() -> bool:
    """Return whether a variable of the environment sets the number of threads of torch."""
    return any(os.environ.get(variable) for variable in _VARIABLES)


def pick_threads(cores: int, seconds: Callable[[int], float] | None = None) -> int:
    """Return the number of threads to compute with now.

    All cores, half of them, and so on down to 1 are tried; fewer threads are taken only if they save a fifth of the time.

    Args:
        cores: largest number.
        seconds: Optional. Returns the time of the work with a number of threads. Default: it is measured.
    """
    seconds, numbers = seconds or _seconds, [cores]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    totals = dict.fromkeys(numbers, 0.0)
    # The numbers alternate, so that another job slows all of them. Sums count rare long waits, which medians would leave out.
    for _ in range(_TIMES if len(numbers) > 1 else 0):
        for number in numbers:
            totals[number] += seconds(number)
    best = cores
    for number in numbers[1:]:
        if totals[number] <= _GAIN * totals[best]:
            best = number
    return best


@torch.no_grad()
def _seconds(number: int) -> float:
    """Return the wall time of products of a size between those of small and of large models, each with an activation."""
    states, weights = torch.ones(256, 512), torch.ones(512, 512) / 512
    with cpu_threads(number):
        torch.relu(states @ weights)  # starts the threads
        started = time.perf_counter()
        for _ in range(_STEPS):
            states = torch.relu(states @ weights)
        return time.perf_counter() - started


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch use this number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
