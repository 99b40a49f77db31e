from __future__ import annotations

import pytest

from selfeval.backbone.placement import DeviceMap
from selfeval.errors import MemoryLimitError
from selfeval.planner.memory_plan import DevicePlan, Plan
from selfeval.planner.workers import check_workers, plan_workers

GIB = 1 << 30


def plan_on(device: str, budget: int | None) -> Plan:
    """A plan of 2 GiB with the model alone, 3 while replies are sampled, and 9 in training."""
    phases = {"load": {"base": 2 * GIB}, "rollout": {"base": 2 * GIB, "kv_cache": GIB}}
    phases |= {"score": {"base": 4 * GIB}, "update": {"base": 9 * GIB}}
    devices = (DevicePlan(device, ("0-3",), budget, phases),)
    return Plan("m", 1, "fp32", DeviceMap(device, (), (), (), {device: 1}), devices, {}, {}, True, ())


def test_workers_share_the_memory_of_a_cpu_with_the_driver() -> None:
    # 2 for the driver, and 9 for each of 4, which train together
    found = plan_workers(plan_on("cpu", 38 * GIB), 4)
    assert (found.total, found.fits, found.most) == (38 * GIB, True, 4)
    check_workers(plan_on("cpu", 38 * GIB), 4)


def test_one_worker_computes_shards_and_ends_before_the_driver_trains() -> None:
    assert plan_workers(plan_on("cpu", 9 * GIB), 1).total == (2 + 3) * GIB


def test_too_many_workers_are_refused_with_numbers() -> None:
    with pytest.raises(MemoryLimitError) as refusal:
        check_workers(plan_on("cpu", 38 * GIB), 5)
    assert str(refusal.value) == (
        "5 workers on cpu take 47.0 GiB: 9.00 GiB each, and 2.00 GiB for the driver; 38.0 GiB are available; use --workers 4, "
        "or lower backbone.batch_tokens and backbone.rollout_batch_size"
    )
    assert "run without --workers" in plan_workers(plan_on("cpu", 4 * GIB), 1).sentence


def test_each_worker_has_a_card_and_the_first_one_shares_it() -> None:
    assert plan_workers(plan_on("cuda:0", 11 * GIB), 8).fits
    assert not plan_workers(plan_on("cuda:0", 10 * GIB), 8).fits
    assert plan_workers(plan_on("cuda:0", None), 8).fits
