from __future__ import annotations

import gc
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from processes import python
from selfeval.backbone.meters import CpuMeter, CudaMeter, cap_gpus, kept_by_allocator, meter_for, peak_resident_bytes

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_the_peak_is_that_since_the_restart_and_what_was_freed_counts() -> None:
    meter = CpuMeter()
    for megabytes in (300, 150):  # the second peak is below the process's highest, which is never reset
        meter.restart()
        before = meter.used()
        held = np.ones(megabytes * MIB, dtype=np.uint8)
        time.sleep(0.1)  # the second peak is sampled
        del held
        peak = meter.peak()
        assert (megabytes - 5) * MIB < peak - before < (megabytes + 50) * MIB
        assert meter.used() < peak - 100 * MIB
        assert peak_resident_bytes() > peak - MIB  # Linux updates its two counters at slightly different times
    meter.restart()
    assert meter.peak() < peak - 100 * MIB


@linux
def test_the_systems_high_water_mark_is_left_alone() -> None:
    """`/usr/bin/time` and schedulers read it."""
    code = """
import resource
import numpy as np
from selfeval.backbone.meters import CpuMeter
np.ones(400 << 20, dtype=np.uint8)
meter = CpuMeter()
for _ in range(3):
    meter.restart()
    meter.peak()
"""
    script = "import resource, subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    found = subprocess.run([sys.executable, "-c", script, code], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) > 400 << 10


@linux
def test_the_systems_own_figure_agrees() -> None:
    system = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak_resident_bytes() >= system


def test_free_memory_is_what_the_machine_has_or_what_the_budget_leaves() -> None:
    free = CpuMeter().free()
    assert free > MIB
    gc.collect()
    *_, used = [CpuMeter(limit=1).used() for _ in range(3)]  # a meter with a limit returns what earlier tests have freed
    assert CpuMeter(limit=used + 3 * MIB).free() < min(free, 20 * MIB)
    assert CpuMeter(limit=1).free() < 0


def test_where_the_backbone_lies_picks_the_meter() -> None:
    found = meter_for([torch.device("cpu"), torch.device("cpu")], 5 * MIB)
    assert isinstance(found, CpuMeter)
    assert found.limit == 5 * MIB
    gpus = meter_for([torch.device("cuda:1"), torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")], 5 * MIB)
    assert isinstance(gpus, CudaMeter)
    assert [str(d) for d in gpus.devices] == ["cuda:0", "cuda:1"]
    assert (gpus.limit, gpus.budget) == (None, 5 * MIB)  # torch enforces it there


@gpu
def test_a_gpu_is_measured_and_its_budget_is_a_true_out_of_memory() -> None:
    device = torch.device("cuda:0")
    meter = CudaMeter([device], budget=512 * MIB)
    cap_gpus(512 * MIB)
    try:
        meter.release()
        meter.restart()
        before, free = meter.used(), meter.free()
        assert free <= 512 * MIB
        held = torch.empty(100 * MIB, dtype=torch.uint8, device=device)
        assert meter.used() - before == 100 * MIB
        del held
        assert (meter.used(), meter.peak() - before) == (before, 100 * MIB)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(600 * MIB, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


_CHURN = """
import sys, torch
from selfeval.backbone.meters import return_freed_memory, CpuMeter
if sys.argv[1] == "saving":
    return_freed_memory()
for _ in range(3):  # blocks of many sizes, freed in another order: what a heap keeps
    held = [torch.ones(20_000 + 7_000 * i) for i in range(200)]
    kept = held[::20]
    del held
print(CpuMeter().used() - sum(t.nbytes for t in kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's switch")
def test_a_process_short_of_memory_returns_what_it_freed() -> None:
    done = [python(_CHURN, mode) for mode in ("plain", "saving")]
    assert [found.returncode for found in done] == [0, 0], done
    used = [int(found.stdout) for found in done]
    assert used[1] < used[0] - 20 * MIB


# -- what the process keeps -------------------------------------------------------------------------------------------------


@linux
def test_between_phases_what_malloc_kept_goes_back() -> None:
    meter = CpuMeter()
    meter.between_phases()  # earlier tests leave free blocks on the heap, which would be taken before new ones
    before = meter.used()
    blocks = [bytearray(64 << 10) for _ in range(1600)]  # 100 MiB in blocks that malloc cuts from its heap
    last = bytearray(64 << 10)  # allocated above them, or the heap would shrink by itself
    del blocks
    assert meter.used() - before > 90 * MIB
    meter.between_phases()
    assert meter.used() - before < 20 * MIB
    del last


def test_a_process_with_a_budget_returns_memory_and_another_one_is_charged_for_what_stays() -> None:
    assert kept_by_allocator(100 * MIB, learning=True, limited=True) == 0
    assert kept_by_allocator(100 * MIB, learning=True, limited=False) in (0, 50 * MIB)  # 0 without glibc
    assert kept_by_allocator(100 * MIB, learning=False, limited=False) in (0, 100 * MIB)
