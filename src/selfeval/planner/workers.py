"""The memory of several workers on one machine: one copy of the model each, and one of the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from selfeval.errors import MemoryLimitError
from selfeval.planner.machine import Machine
from selfeval.planner.memory_plan import Plan
from selfeval.planner.model_configs import ModelFacts
from selfeval.texts import format_bytes

__all__ = ["WorkersPlan", "check_workers", "is_far_below", "plan_workers"]

_MAPPED = ("load", "rollout")
"""Phases of a worker that only computes shards. Judging a batch takes less than sampling one of the same size."""
_SMALL, _OVERHEAD = 300_000_000, 3 << 30


@dataclass(frozen=True)
class WorkersPlan:
    """Memory of the workers of a run.

    Attributes:
        workers: number of workers on this machine.
        device: device that they share, or, on GPUs, the one of the driver and the first worker.
        driver: bytes of the driver while the workers compute: it only holds the model.
        worker: bytes of one worker.
        shared: number of workers on the device.
        budget: bytes that are available there; None if nothing is known to limit them.
    """

    workers: int
    device: str
    driver: int
    worker: int
    shared: int
    budget: int | None

    @property
    def total(self) -> int:
        return self.driver + self.shared * self.worker

    @property
    def fits(self) -> bool:
        return self.budget is None or self.total <= self.budget

    @property
    def most(self) -> int:
        """Return the largest number of workers that fit on the device; 0 if not even one does."""
        return self.shared if self.budget is None else max(0, (self.budget - self.driver) // self.worker)

    @property
    def sentence(self) -> str:
        number = f"{self.shared} worker{'s' if self.shared > 1 else ''}"
        text = (
            f"{number} on {self.device} take {format_bytes(self.total)}: {format_bytes(self.worker)} each, and "
            f"{format_bytes(self.driver)} for the driver"
        )
        if self.budget is None:
            return text
        there = f"{text}; {format_bytes(self.budget)} are available"
        if self.fits:
            return there
        remedy = f"use --workers {self.most}" if self.most else "run without --workers"
        return f"{there}; {remedy}, or lower backbone.batch_tokens and backbone.rollout_batch_size"

    def as_json(self) -> dict[str, Any]:
        return {
            "workers": self.workers,
            "device": self.device,
            "driver_bytes": self.driver,
            "worker_bytes": self.worker,
            "total_bytes": self.total,
            "budget_bytes": self.budget,
            "most": self.most,
            "fits": self.fits,
        }


def plan_workers(plan: Plan, workers: int) -> WorkersPlan:
    """Plan the memory of workers from the plan of one process.

    On a CPU all of them share the RAM: load + N peak, where the peak is that of training for N > 1, and max(load, rollout) for
    one worker, which is ended before the driver trains. On GPUs each has its own, and the first one shares it with the driver.
    In training this is an upper bound: the driver has released its model.

    Args:
        plan: memory of one process.
        workers: number of workers on this machine.
    """
    main = plan.main
    shared = 1 if main.device.startswith("cuda:") else workers
    worker = main.peak if workers > 1 else max(main.total(phase) for phase in _MAPPED)
    return WorkersPlan(workers, main.device, main.total("load"), worker, shared, main.budget)


def is_far_below(facts: ModelFacts, machine: Machine, workers: int) -> bool:
    """Return whether copies of the model surely fit: each counts as fp32 weights and 3 GiB for everything else.

    Only for models whose work takes less than that: those below 300 million parameters.

    Args:
        facts: facts of the model.
        machine: this machine.
        workers: number of workers; the driver has a copy too.
    """
    numbers = sum(parameter.numel() for parameter in facts.shell.parameters())
    budget = machine.budget(next(iter(machine.memory)))
    return numbers < _SMALL and (budget is None or (workers + 1) * (4 * numbers + _OVERHEAD) < budget)


def check_workers(plan: Plan, workers: int) -> None:
    """Refuse workers that do not fit.

    Raises:
        MemoryLimitError: see above; with the bytes, and the number that would fit.
    """
    found = plan_workers(plan, workers)
    if not found.fits:
        raise MemoryLimitError(found.sentence)
