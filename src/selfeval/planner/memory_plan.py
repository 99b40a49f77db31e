"""The arithmetic of a memory plan: bytes by device, phase and kind, and the most that fits a budget.

A peak is the sum of all kinds at the fullest moment of a phase; runtime, kernels and allocator are of the process, and counted
in RAM only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfeval.backbone.placement import DeviceMap

__all__ = ["KINDS", "PHASES", "DevicePlan", "Plan", "at_depth", "largest_fitting"]

PHASES = ("load", "rollout", "score", "update")
KINDS = ("runtime", "base", "adapters", "gradients", "optimizer", "kv_cache", "activations", "logits", "kernels", "allocator")


def at_depth(least: Mapping[str, int], deeper: Sequence[Mapping[str, int]], steps: Sequence[float]) -> Counter[str]:
    """Bytes by kind of a deep model from shallow ones, since every further layer of a span adds the same:
    `least + sum_i steps_i (deeper_i - least)`.

    Args:
        least: of the shallowest model.
        deeper: for each span of layers (those on one device), of that model with a little more of it.
        steps: how many times that little is added.
    """
    kinds = {*least, *(kind for one in deeper for kind in one)}

    def grown(kind: str) -> int:
        start = least.get(kind, 0)
        return round(start + sum(n * (one.get(kind, 0) - start) for one, n in zip(deeper, steps, strict=True)))

    return Counter({kind: grown(kind) for kind in kinds})


def largest_fitting(measure: Callable[[int], int], wanted: int, budget: int) -> int:
    """The largest n <= wanted with measure(n) <= budget; 0 where even one is too much.

    Measuring is slow, and what it measures is nearly straight in n. So the next guess is where the line through both ends meets
    the budget, and the search ends when the line from a guess that fits to one that does not says that the next n does not.
    Where the measure bends downwards or not at all, that is exact; where it bends upwards, the result may be too small.

    Args:
        measure: bytes that n rows take; grows with n.
        wanted: at least 1.
        budget: bytes.
    """
    low, high = 1, wanted
    most = measure(high)
    if most <= budget:
        return wanted
    least = measure(low)
    if least > budget:
        return 0
    # Invariant: `low` fits and `high` does not, so the line between them rises and `step` is positive.
    while high - low > 1:
        step = (most - least) / (high - low)
        if least + step > budget:
            return low
        # At least low + 1, because one more step fits according to the line, and below `high`, which is known not to fit.
        guess = min(low + int((budget - least) / step), high - 1)
        found = measure(guess)
        if found > budget:
            high, most = guess, found
        else:
            low, least = guess, found
    return low


@dataclass(frozen=True)
class DevicePlan:
    """Estimated memory of a run on one device.

    Attributes:
        device: `cuda:N`, `cpu` or `disk`.
        layers: decoder layers on this device, as `("0-11",)`.
        budget: bytes that may be taken there, None where nothing is known to limit them.
        phases: phase -> kind -> bytes at that phase's fullest moment on this device.
    """

    device: str
    layers: tuple[str, ...]
    budget: int | None
    phases: Mapping[str, Mapping[str, int]]

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        """The phase in which it holds most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return self.total(self.fullest)

    @property
    def over(self) -> int:
        """Bytes that are missing; negative where there is room left."""
        return -1 if self.budget is None else self.peak - self.budget

    def as_json(self) -> dict[str, Any]:
        rows = {p: {**{k: int(self.phases[p].get(k, 0)) for k in KINDS}, "total": self.total(p)} for p in PHASES}
        layers, budget, peak = list(self.layers), self.budget, self.peak
        return {"device": self.device, "layers": layers, "budget_bytes": budget, "peak_bytes": peak, "phases": rows}


@dataclass(frozen=True)
class Plan:
    """Estimated memory of a run, and the settings it applies to.

    Attributes:
        placement: which device holds what; as loading would place it.
        devices: estimate per device, the main device first.
        settings: values of the configuration that the plan has chosen.
        workload: tokens and rows that it was made for.
        fits: every phase is within the budget of every device.
        changes: messages about settings chosen or changed to make the run fit, or changes that would be needed.
    """

    model: str
    parameters: int
    precision: str
    placement: DeviceMap
    devices: tuple[DevicePlan, ...]
    settings: Mapping[str, Any]
    workload: Mapping[str, int]
    fits: bool
    changes: tuple[str, ...]

    @property
    def main(self) -> DevicePlan:
        """The device of batches, embeddings and output layer."""
        return self.devices[0]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON: schema 1, sizes in bytes."""
        return {
            "schema": 1,
            "model": self.model,
            "parameters": self.parameters,
            "precision": self.precision,
            "fits": self.fits,
            "main": self.placement.main,
            "streamed_layers": len(self.placement.streamed),
            "devices": [device.as_json() for device in self.devices],
            "settings": dict(self.settings),
            "workload": dict(self.workload),
            "changes": list(self.changes),
        }
