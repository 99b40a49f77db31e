"""Time several sides of a comparison in alternating rounds, so that another job on the machine slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

__all__ = ["Comparison", "Measure", "Seconds", "Side", "SideTimes", "take_turns", "timed"]

Measure = Literal["cpu", "wall"]
"""Seconds that rates and ratios are computed from: those of the process's CPU time, or of the clock on the wall."""
Group = Literal["ours", "separate", "hugging_face", "limit"]


@dataclass(frozen=True)
class Seconds:
    """Time of one piece of work: CPU seconds of this process, all threads together, and wall seconds."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        group: what it is; several sides of a group differ in their setting, and the fastest counts.
        setting: its setting in words, such as `batch 32`.
        run: does the work once and returns its time.
    """

    group: Group
    setting: str
    run: Callable[[], Seconds]


@dataclass(frozen=True)
class SideTimes:
    """The times of one side, one per round."""

    group: Group
    setting: str
    seconds: tuple[Seconds, ...]

    def values(self, measure: Measure) -> list[float]:
        """Return the seconds of each round."""
        return [getattr(one, measure) for one in self.seconds]

    def median(self, measure: Measure) -> float:
        return median(self.values(measure))


@dataclass(frozen=True)
class Comparison:
    """The times of all sides on the same work.

    Attributes:
        title: what was done.
        unit: what is counted, such as `reply tokens`.
        units: their number per round.
        measure: seconds that rates and ratios are computed from.
        sides: one of them has the group `ours`, and setting by setting those of the others.
    """

    title: str
    unit: str
    units: int
    measure: Measure
    sides: tuple[SideTimes, ...]

    def best(self, group: Group) -> SideTimes | None:
        """Return the fastest side of a group, or None if it has none."""
        found = [side for side in self.sides if side.group == group]
        return min(found, key=lambda side: side.median(self.measure), default=None)

    def rate(self, side: SideTimes) -> float:
        """Return the units per second of the median round."""
        return self.units / side.median(self.measure)

    def ratio(self, side: SideTimes) -> float:
        """Return the median time of a side divided by that of ours; above 1 it is slower than ours."""
        ours = self.best("ours")
        assert ours is not None  # every comparison has it
        return side.median(self.measure) / ours.median(self.measure)

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "units": self.units,
            "measure": self.measure,
            "sides": [self._side_json(side) for side in self.sides],
        }

    def _side_json(self, side: SideTimes) -> dict[str, Any]:
        times = {
            f"{measure}_seconds": {
                "median": side.median(measure),
                "lowest": min(side.values(measure)),
                "highest": max(side.values(measure)),
                "rounds": side.values(measure),
            }
            for measure in ("cpu", "wall")
        }
        return {
            "side": side.group,
            "setting": side.setting,
            "best": side is self.best(side.group),
            **times,
            "rate": self.rate(side),
            "ratio_to_ours": self.ratio(side),
        }


def timed(work: Callable[[], object], device: torch.device) -> Seconds:
    """Return the time of a piece of work. On a GPU it includes the kernels that the work started."""
    _wait(device)
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    _wait(device)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    sides: Sequence[Side], rounds: int, report_progress: Callable[[str], None] = lambda text: None, *, warm_up: bool = True
) -> tuple[SideTimes, ...]:
    """Run every side once per round.

    Args:
        sides: the sides, in the order of their turns.
        rounds: rounds that count.
        report_progress: called with the current step. Default: does nothing.
        warm_up: whether a first round, which does not count, sets up caches and kernels. Default: True.
    """
    found: list[list[Seconds]] = [[] for _ in sides]
    for number in range(0 if warm_up else 1, rounds + 1):
        for side, seconds in zip(sides, found, strict=True):
            turn = f"round {number} of {rounds}" if number else "warm-up"
            report_progress(f"{turn}: {_name(side)}")
            spent = side.run()
            if number:
                seconds.append(spent)
    return tuple(SideTimes(side.group, side.setting, tuple(s)) for side, s in zip(sides, found, strict=True))


def _name(side: Side) -> str:
    name = side.group.replace("_", " ")
    return f"{name}, {side.setting}" if side.setting else name
