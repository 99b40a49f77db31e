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
_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_TIMES, _STEPS = 4, 8
_GAIN = 0.8
"""Fewer threads must take at most this share of the time of more: threads save more in large models than in this work."""


def usable_cores(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return the number of cores that this process may use: its affinity, and the CPU quotas of its control groups.

    Args:
        groups: root of the control groups, of version 1 or 2.
        membership: file with the control groups of this process.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _group_folders(groups, membership) if (quota := _quota(folder)) is not None]
    return max(1, min(affinity, *map(math.ceil, quotas))) if quotas else affinity


def _group_folders(groups: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders with the quotas of this process: of its control group, and of those around it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has no names here; version 1 has a tree for each controller.
        if not controllers or "cpu" in controllers.split(","):
            root = groups / "cpu" if controllers else groups
            inner = root / path.lstrip("/")
            yield from (inner, *(folder for folder in inner.parents if folder.is_relative_to(root)))
    # In a container, its control group may be the root although the file names that of the host.
    yield from (groups, groups / "cpu")


def _quota(folder: Path) -> float | None:
    """Return the cores that a control group may use, or None without a limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            allowed, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            return None if allowed in ("max", "-1") else int(allowed) / int(period)
        except (OSError, ValueError):
            continue
    return None


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
