"""How much memory this process uses, how much it once used, and how much is free: resident memory, or that of the GPUs."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch

from selfeval.backbone.placement import free_memory

__all__ = [
    "CpuMeter",
    "CudaMeter",
    "Meter",
    "cap_gpus",
    "keep_few_kernels",
    "kept_by_allocator",
    "kernel_bytes",
    "meter_for",
    "peak_resident_bytes",
    "resident_bytes",
    "return_freed_memory",
]

# The option's number in glibc's malloc.h, and 128 KiB, from which size on a block is mapped and returned separately.
_M_MMAP_THRESHOLD, _MAPPED_BLOCK = -3, 1 << 17
_HAS_GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
_KERNELS, _KERNEL_BYTES = 32, 640 << 10
"""Kernels that are remembered, and about what one takes (measured on a CPU with AMX)."""
_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.005


class Meter(Protocol):
    """Reads the memory that passes through the model take from.

    Attributes:
        limit: bytes that the process should not pass, where nothing else holds it to them; None without such a limit.
    """

    limit: int | None

    def used(self) -> int:
        """Bytes in use now."""

    def free(self) -> int:
        """Measure the bytes still available to this process; not cached, because other jobs use memory too."""

    def restart(self) -> None:
        """Begins to watch for a peak."""

    def peak(self) -> int:
        """Most bytes in use since `restart`."""

    def release(self) -> None:
        """Give back what is only kept for later."""

    def between_phases(self) -> None:
        """Give back what the last phase kept and the next one does not need, where that costs next to no time."""

    def save_memory(self) -> None:
        """Use less memory from now on at the expense of time; called when memory is short."""


class CpuMeter:
    """Resident memory of this process.

    Args:
        limit: Optional. Bytes beyond which the process counts as out of memory. The system does not enforce it, so freed memory
            is returned at once from the start. Default: no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        if limit is not None:
            self.save_memory()

    def used(self) -> int:
        return resident_bytes()

    def free(self) -> int:
        available = free_memory(torch.device("cpu"))["cpu"]
        return available if self.limit is None else min(available, self.limit - self.used())

    def restart(self) -> None:
        _peak.restart()

    def peak(self) -> int:
        return _peak.stop()

    def release(self) -> None:
        gc.collect()
        _trim_heap()

    def between_phases(self) -> None:
        _trim_heap()

    def save_memory(self) -> None:
        return_freed_memory()
        _trim_heap()


class CudaMeter:
    """Memory of the backbone's GPUs; the fullest one counts.

    A budget is enforced by torch's allocator (`cap_gpus`), so exceeding it raises an ordinary out-of-memory error.

    Args:
        devices: the GPUs.
        budget: bytes per GPU that `cap_gpus` was given.
    """

    limit: int | None = None

    def __init__(self, devices: Sequence[torch.device], budget: int | None = None) -> None:
        self.devices, self.budget = tuple(devices), budget

    def used(self) -> int:
        return max(torch.cuda.memory_allocated(d) for d in self.devices)

    def free(self) -> int:
        return min(self._free(d) for d in self.devices)

    def _free(self, device: torch.device) -> int:
        reserved = torch.cuda.memory_reserved(device)
        # Free for the driver, plus the blocks that torch has reserved but does not use.
        unreserved = torch.cuda.mem_get_info(device)[0]
        if self.budget is not None:
            unreserved = min(unreserved, self.budget - reserved)
        return unreserved + reserved - torch.cuda.memory_allocated(device)

    def restart(self) -> None:
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> int:
        return max(torch.cuda.max_memory_allocated(d) for d in self.devices)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def between_phases(self) -> None:
        """Torch's reserve serves every phase: giving it back means asking the driver for it again."""

    def save_memory(self) -> None:
        """The allocator's reserve was released when memory ran out; it takes nothing else."""


def meter_for(devices: Iterable[torch.device], budget: int | None = None) -> Meter:
    """The meter of these devices: that of the GPUs among them, else that of this process's resident memory."""
    gpus = sorted({d for d in devices if d.type == "cuda"}, key=str)
    return CudaMeter(gpus, budget) if gpus else CpuMeter(budget)


def cap_gpus(budget: int) -> None:
    """Limit torch to `budget` bytes on every visible GPU; memory of CUDA itself (a few 100 MiB) is not counted."""
    for index in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), index)


class _PeakSinceRestart:
    """Highest resident memory of a stretch of work: the larger of two readings.

    The system's high-water mark is exact, but says nothing unless the work raised it, and it is never reset: it belongs to
    everyone who measures this process. A thread that samples the resident memory every few milliseconds sees lower peaks.
    """

    def __init__(self) -> None:
        self._mark, self._highest = 0, [0]
        self._working = threading.Event()
        self._thread: threading.Thread | None = None

    def restart(self) -> None:
        # A new list, because the thread may be about to write a sample of earlier work.
        self._mark, self._highest = peak_resident_bytes(), [0]
        self._working.set()
        if self._thread is None or not self._thread.is_alive():  # it does not survive a fork
            self._thread = threading.Thread(target=self._sample, name="selfeval memory", daemon=True)
            self._thread.start()

    def stop(self) -> int:
        """End the stretch of work and return its peak in bytes."""
        self._working.clear()
        mark = peak_resident_bytes()
        return max(mark if mark > self._mark else 0, self._highest[0], resident_bytes())

    def _sample(self) -> None:
        process, pause = psutil.Process(), threading.Event()
        while self._working.wait():
            highest = self._highest
            highest[0] = max(highest[0], int(process.memory_info().rss))
            pause.wait(_SAMPLE_SECONDS)


_peak = _PeakSinceRestart()


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # VmHWM where there is one: ru_maxrss also counts what the process was before exec, such as a large parent.
    if _STATUS.exists():
        found = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    import resource

    # Bytes on macOS, KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def return_freed_memory() -> None:
    """Make the C library (glibc) return large blocks to the system as soon as they are freed.

    By default it raises the size from which blocks are returned up to 32 MiB, and retains what training freed: for a base of
    400 MB, half as much again as was alive. Returning every block costs a quarter to a third of all CPU time, because its pages
    are mapped and cleared again each time, so this is for a process that is short of memory.
    """
    with contextlib.suppress(OSError, AttributeError):
        # Setting the threshold at all also stops glibc from raising it by itself.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BLOCK)


def kept_by_allocator(alive: int, *, learning: bool, limited: bool) -> int:
    """Estimate the freed bytes that the C library retains during a phase.

    Measured by benchmarks/planner.py: as much as is alive without a backward pass, and half as much with one.

    Args:
        alive: bytes that the phase allocates and frees: activations, gradients, caches.
        learning: the phase has a backward pass, whose fullest moment consists of long-lived blocks.
        limited: the process has a memory budget, so freed memory is returned (`return_freed_memory`).
    """
    kept = alive // 2 if learning else alive
    return 0 if limited or not _HAS_GLIBC else kept


def keep_few_kernels() -> None:
    """Let torch and oneDNN remember the kernels of few shapes, where nothing else is set.

    In 16 bits, oneDNN compiles a kernel for every shape of a product and keeps 1024 of them. Replies have many lengths, so that
    this would grow to 600 MiB. A few are enough: within a pass, all layers have the same shapes. To be called before the
    first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))


def kernel_bytes() -> int:
    """Estimate the memory of compiled 16-bit matmul kernels on a CPU, at the limit set by `keep_few_kernels`."""
    return _KERNELS * _KERNEL_BYTES


def _trim_heap() -> None:
    """Ask the C library to give freed memory back to the system, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
