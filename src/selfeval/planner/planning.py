"""Find the largest settings of a run that fit the memory of its devices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from selfeval.backbone.adapter_check import check_adapters
from selfeval.backbone.families.cache import check_state
from selfeval.backbone.load import Wanted, pick_attention, place_base
from selfeval.backbone.placement import ENDLESS, DeviceMap, plan_placement, usable_memory
from selfeval.config import BackboneConfig, PlacementConfig, RunConfig
from selfeval.errors import ModelError
from selfeval.planner.advice import adapted, quantised_alternatives, refused
from selfeval.planner.machine import Machine
from selfeval.planner.measurement import Measured
from selfeval.planner.memory_plan import PHASES, DevicePlan, Plan, largest_fitting
from selfeval.planner.model_configs import ModelFacts
from selfeval.planner.shape_tracing import Peaks
from selfeval.planner.workload import Workload, workload

__all__ = ["make_plan"]


def _place(config: BackboneConfig, facts: ModelFacts, machine: Machine) -> tuple[str, DeviceMap, list[str]]:
    """Choose precision and device map as loading does, with notes; if nothing fits, put everything on the first device."""
    model, memory = facts.shell, machine.weights
    target = torch.device(machine.kind)
    wanted = Wanted(facts.name, model, config.device, config.precision, config.placement, memory)
    said: list[str] = []
    usable_memory(memory, config.placement)  # refuse a limit for a missing device early: no size would fix it
    try:
        picked, why, placement = place_base(wanted, target)
    except ModelError as error:
        single = PlacementConfig(mode="single")
        picked, why, placement = place_base(replace(wanted, placement=single), target)
        said.append(f"does not fit: {error}")
    # Called for its errors. In 16 bits on a GPU, the plan does not depend on whether flash-attn is installed here.
    if config.context.attention == "flash_attention_2" and (machine.kind == "cpu" or picked == "fp32"):
        pick_attention(config.context.attention, target, picked)
    # Mode "single" has no placement: everything is on the first device, however large it is.
    return picked, placement or plan_placement(model, {next(iter(memory)): ENDLESS}, picked), ([why] if why else []) + said


def make_plan(
    config: RunConfig,
    facts: ModelFacts,
    machine: Machine,
    *,
    work: Workload | None = None,
    report_progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan the memory of a run of one model under this configuration.

    Args:
        config: requested settings; its `batch_tokens`, `rollout_batch_size` and `checkpointing` are kept if they fit.
        facts: facts of the model; no weight is loaded.
        machine: the devices and their free memory.
        work: Optional. Token counts. Default: the longest that the configuration allows.
        report_progress: called with a sentence before each step that may take seconds. Default: does nothing.

    Returns:
        The plan with the largest settings that fit, up to the requested ones. If nothing fits, the plan of one row at a time,
        with sentences about what would have to change.

    Raises:
        ModelError, ConfigError: a model that a run refuses, or adapters, a context or attention that it does not support.
    """
    facts = facts.within(config.backbone.context)
    report_progress(f"checking {facts.name}")
    _check_usable(config.backbone, facts)
    report_progress(f"placing the weights of {facts.name}")
    precision, placement, said = _place(config.backbone, facts, machine)
    work = work or workload(config, facts.context)
    found = _search(
        _Search(config.backbone, machine, report_progress),
        lambda checkpointing: Measured(facts, config, precision, placement, work, checkpointing, machine.runtime),
    )
    fits = found.fits and not any(s.startswith("does not fit") for s in said)
    measured = found.learned
    devices = tuple(_device_plans(placement, machine, found.phases))
    plan = Plan(
        facts.name, measured.sizes.numbers, precision, placement, devices, found.settings(config.backbone), vars(work), fits, ()
    )
    changes = adapted(config.backbone, plan) if fits else refused(config, facts, plan, machine)
    return replace(plan, changes=(*said, *changes, *quantised_alternatives(config.backbone, facts, plan)))


def _check_usable(config: BackboneConfig, facts: ModelFacts) -> None:
    """Make the checks that a run makes before loading, before anything is measured.

    Raises:
        ModelError, ConfigError: the model cannot write several replies at once, or does not support these adapters.
    """
    check_state(facts)
    # check_adapters injects adapters, but the shell is weighed later.
    check_adapters(copy.deepcopy(facts.shell), config.lora, facts.name)


@dataclass(frozen=True)
class _Search:
    """Searches for the largest settings that fit on every device, up to the requested ones.

    Attributes:
        report_progress: called with a sentence before each measurement.
    """

    config: BackboneConfig
    machine: Machine
    report_progress: Callable[[str], None]

    def _missing(self, peaks: Peaks) -> int:
        """Return the bytes that the tightest device lacks; negative if everything fits."""
        budgets = {device: self.machine.budget(device) for device in peaks}
        # Devices without a budget cannot lack memory; -1 if there is no other.
        return max((peaks[d].total() - b for d, b in budgets.items() if b is not None), default=-1)

    def replies(self, measured: Measured) -> int:
        """Return the number of replies sampled at once; 0 if not even one fits."""

        def misses(rows: int) -> int:
            self.report_progress(f"measuring {rows} concurrent replies")
            return self._missing(measured.rollout(rows))

        # The measure is the bytes missing on the tightest device, so the budget is 0.
        return largest_fitting(misses, self.config.rollout_batch_size, 0)

    def rows(self, measured: Measured) -> int:
        """Return the rows of a micro-batch; 0 if not even one fits."""

        def misses(rows: int) -> int:
            how = "recomputed" if measured.checkpointing else "kept"
            self.report_progress(f"measuring micro-batches of {rows} rows, layers {how}")
            return max(self._missing(peaks) for peaks in measured.learning(rows).values())

        return largest_fitting(misses, _wanted_rows(self.config, measured.work), 0)


def _wanted_rows(config: BackboneConfig, work: Workload) -> int:
    return max(1, config.batch_tokens // work.longest)


@dataclass(frozen=True)
class _Found:
    """The settings found by the search.

    Attributes:
        sampled, learned: measurements of sampling, and of learning with activations kept or recomputed.
        replies, rows: replies sampled at once and rows of a micro-batch; 0 if not even one fits.
    """

    sampled: Measured
    learned: Measured
    replies: int
    rows: int

    @property
    def fits(self) -> bool:
        return self.replies > 0 and self.rows > 0

    @property
    def phases(self) -> dict[str, Peaks]:
        # Sampling has no backward pass, so checkpointing does not affect it: measure it once.
        rollout = self.sampled.rollout(max(1, self.replies))
        return {"load": self.learned.load(), "rollout": rollout, **self.learned.learning(max(1, self.rows))}

    def settings(self, config: BackboneConfig) -> dict[str, Any]:
        # Keep the requested batch_tokens if it fits, instead of rounding it down to whole rows.
        work, rows = self.learned.work, max(1, self.rows)
        return {
            "batch_tokens": config.batch_tokens if self.rows == _wanted_rows(config, work) else rows * work.longest,
            "rollout_batch_size": max(1, self.replies),
            "checkpointing": self.learned.checkpointing,
            "micro_batch_rows": rows,
        }


def _search(search: _Search, measured_with: Callable[[bool], Measured]) -> _Found:
    """Search with activation checkpointing if it is configured, or if not even one row fits without it."""
    sampled = learned = measured_with(search.config.checkpointing)
    replies, rows = search.replies(sampled), search.rows(learned)
    if rows == 0 and not learned.checkpointing:
        learned = measured_with(True)
        rows = search.rows(learned)
    return _Found(sampled, learned, replies, rows)


def _device_plans(placement: DeviceMap, machine: Machine, phases: Mapping[str, Peaks]) -> list[DevicePlan]:
    """Return the memory use of each device, the main one first."""
    found = []
    for device in sorted(placement.bytes, key=lambda name: (name != placement.main, list(machine.memory).index(name))):
        layers = tuple(span for span, where in placement.spans() if where == device)
        kinds = {phase: phases[phase][device] for phase in PHASES}
        found.append(DevicePlan(device, layers, machine.budget(device), kinds))
    return found
