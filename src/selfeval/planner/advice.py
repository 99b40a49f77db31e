"""Messages of a plan: the settings that it lowered, or the changes that would make a run fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from transformers.utils import is_bitsandbytes_available

from selfeval.backbone.precision import PRECISIONS
from selfeval.config import BackboneConfig, RunConfig
from selfeval.planner.machine import Machine
from selfeval.planner.memory_plan import DevicePlan, Plan
from selfeval.planner.model_configs import ModelFacts, weigh
from selfeval.texts import format_bytes

__all__ = ["adapted", "quantised_alternatives", "refused"]

_bytes = partial(format_bytes, digits=4)
"""Four digits, because the planner compares sizes that are close."""


def adapted(config: BackboneConfig, plan: Plan) -> list[str]:
    """List the settings that were reduced, in the form in which to set them."""
    names = ("batch_tokens", "rollout_batch_size", "checkpointing")
    changed = {name: plan.settings[name] for name in names if plan.settings[name] != getattr(config, name)}
    if not changed:
        return []
    given = " ".join(f"--set backbone.{name}={str(value).lower()}" for name, value in changed.items())
    wanted = ", ".join(f"{name} {str(getattr(config, name)).lower()}" for name in changed)
    there = ", ".join(f"{_bytes(d.budget)} on {d.device}" for d in plan.devices if d.budget is not None)
    return [f"{there} is too little for {wanted}; use {given} (for a run in progress: --memory-budget)"]


def refused(config: RunConfig, facts: ModelFacts, plan: Plan, machine: Machine) -> list[str]:
    """Explain why nothing fits, and what would have to change."""
    said = []
    for device in (d for d in plan.devices if d.over > 0):
        base = device.phases["load"]["base"]
        said.append(
            f"does not fit: {device.fullest} takes {_bytes(device.peak)} on {device.device} with one row at a time and layers "
            f"recomputed, of which the base is {_bytes(base)}; {_bytes(device.budget or 0)} are available"
        )
        said += _elsewhere(config.backbone, machine, device)
        said += _smaller(config.backbone, facts, plan, device) if len(plan.devices) == 1 else []
        # Shorter texts help only where the base alone fits.
        if 0 < base < (device.budget or 0):
            said.append(
                f"shorter texts reduce the {_bytes(device.peak - base)} on top of the base ({config.replies.limiting}="
                f"{config.replies.longest}, verdicts.max_new_tokens={config.verdicts.max_new_tokens} now)"
            )
    if plan.main.device != "cpu":
        said.append(f"backbone.device=cpu has {_bytes(machine.memory['cpu'])} of free memory")
    tight = max(plan.devices, key=lambda device: device.over)
    return [*said, f"or provide {_bytes(tight.peak)} of memory on {tight.device}, or use a smaller model"]


def _elsewhere(config: BackboneConfig, machine: Machine, device: DevicePlan) -> list[str]:
    """Suggest a larger reserve on this device, if its weights can move to another one."""
    # Devices are in the order of use, so layers can move only to later ones.
    others = list(machine.memory)[list(machine.memory).index(device.device) + 1 :]
    beside = device.peak - device.phases["load"]["base"]
    free = max(1, machine.weights[device.device])
    # The share of free memory that everything but the base takes, rounded up to 5%.
    reserve = math.ceil(20 * beside / free) / 20
    if not others or config.placement.mode == "single" or not config.placement.reserve < reserve < 1:
        return []
    return [f"about backbone.placement.reserve={reserve:.2f} would move layers from {device.device} to {', '.join(others)}"]


def _smaller(config: BackboneConfig, facts: ModelFacts, plan: Plan, device: DevicePlan) -> Sequence[str]:
    """Estimate the memory use at lower precisions."""
    said, base = [], device.phases["load"]["base"]
    for precision in _precisions(config):
        saved = base - weigh(facts, precision).total
        if saved > 0 and precision != plan.precision:
            left = device.peak - saved
            verdict = "which fits" if left <= (device.budget or 0) else "which is not enough on its own"
            said.append(f"backbone.precision={precision} takes about {_bytes(left)}, {verdict}")
    return said


def quantised_alternatives(config: BackboneConfig, facts: ModelFacts, plan: Plan) -> list[str]:
    """List quantised precisions that would help but were skipped because bitsandbytes is not installed."""
    device, is_tight = plan.main, not plan.fits or not plan.placement.is_whole
    if config.precision != "auto" or not is_tight or device.budget is None or is_bitsandbytes_available():
        return []
    # The estimate keeps everything but the base as it is in the planned precision.
    beside = device.peak - device.phases[device.fullest].get("base", 0)
    said = []
    for precision in (name for name in _precisions(config) if PRECISIONS[name].quantised):
        takes = weigh(facts, precision).total + beside
        verdict = "which fits" if takes <= device.budget else "which is not enough on its own"
        said.append(
            f"backbone.precision={precision} takes about {_bytes(takes)} on {device.device}, {verdict}; it needs bitsandbytes, "
            "which is not installed: pip install 'self-evaluator[quantised]'"
        )
    return said


def _precisions(config: BackboneConfig) -> list[str]:
    """Return the precisions that the configuration allows and the planner supports, largest first."""
    allowed: tuple[Any, ...] = get_args(type(config).model_fields["precision"].annotation)
    return [name for name in PRECISIONS if name in allowed and name != "fp16"]
