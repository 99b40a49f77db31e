"""The number of CPU threads of a stage: as many as pay at the moment.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["cpu_threads", "pick_threads", "usable_cores"]

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables with which users set the number of threads of torch."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TIMES, _STEPS = 5, 40
_GAIN = 0.9
"""More threads must take at most this share of the time of fewer."""


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


def pick_threads(
    environment: Mapping[str, str] | None = None,
    cores: int | None = None,
    seconds: Callable[[int], float] | None = None,
) -> int:
    """Return the number of threads with which a short piece of work is fastest now.

    All usable cores, half of them, and so on down to 1 are tried; more threads are taken only if they save a tenth of the time.

    Args:
        environment: Optional. Where `OMP_NUM_THREADS` or `MKL_NUM_THREADS` is set, torch's number is kept. Default: that of
            the process.
        cores: Optional. Largest number. Default: `usable_cores`.
        seconds: Optional. Returns the time of the work with a number of threads. Default: it is measured.
    """
    environment = os.environ if environment is None else environment
    if any(environment.get(variable) for variable in _VARIABLES):
        return torch.get_num_threads()
    cores, seconds = cores or usable_cores(), seconds or _seconds
    numbers = [cores]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    numbers.reverse()
    totals = dict.fromkeys(numbers, 0.0)
    # In turn, so that all of them meet the same load. The sum counts rare long waits, which a median would leave out.
    for _ in range(_TIMES if len(numbers) > 1 else 0):
        for number in numbers:
            totals[number] += seconds(number)
    best = numbers[0]
    for number in numbers[1:]:
        if totals[number] <= _GAIN * totals[best]:
            best = number
    return best


@torch.no_grad()
def _seconds(number: int) -> float:
    """Return the wall time of some products of the size of a small model's, each followed by an activation."""
    states, weights = torch.ones(256, 256), torch.ones(256, 256) / 256
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
