"""Loss scaling, which prevents gradient underflow in an fp16 base.

The smallest number of fp16 is 6e-8, and below 6e-5 it loses digits; the gradient of a mean over the tokens of a batch is often
there. The loss is multiplied by a power of two before the backward pass, and the gradients of the adapters, which are fp32, are
divided by it after (Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740). A power of two changes no digit.

The scale is a property of the base, so the trained weights of its roles know it: no training loop has to remember it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

__all__ = ["LossScale", "Origin", "mark", "name_of", "scale_of"]

_FIRST, _MOST = 2.0**16, 2.0**24
_PATIENCE = 200
"""Backward passes that must go well before the scale doubles; one that then overflows costs a second pass, and nothing else."""


class LossScale:
    """The factor of the loss: halved when a gradient overflows, doubled after a while without.

    Args:
        notify: callback that receives a message each time the scale reaches a new minimum.

    Attributes:
        value: a power of two, at least 1.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.value, self._well, self._lowest, self._notify = _FIRST, 0, _FIRST, notify

    def halve(self) -> bool:
        """Halve the scale after an overflow; return False if it is already 1, because scaling was then not the cause."""
        if self.value == 1.0:
            return False
        self.value, self._well = self.value / 2, 0
        if self.value < self._lowest:
            self._lowest = self.value
            self._notify(f"gradients overflowed fp16 at a loss scale of {2 * self.value:.0f}; continuing with {self.value:.0f}")
        return True

    def went_well(self) -> None:
        """Count a backward pass whose gradients were finite."""
        self._well += 1
        if self._well >= _PATIENCE and self.value < _MOST:
            self.value, self._well = 2 * self.value, 0

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint; with it, resumed training rounds exactly like uninterrupted training."""
        return {"value": self.value, "well": self._well}

    def load(self, state: dict[str, float]) -> None:
        """Put back what `state` gave."""
        self.value, self._well = state["value"], int(state["well"])
        self._lowest = min(self._lowest, self.value)


@dataclass(frozen=True)
class Origin:
    """Name of a trained weight, and the loss scale that applies to it; None if no scaling is needed."""

    name: str
    scale: LossScale | None


def mark(parameter: nn.Parameter, origin: Origin) -> None:
    """Note on a weight where it belongs."""
    vars(parameter)["origin"] = origin


def name_of(parameter: nn.Parameter) -> str | None:
    """Return the name of a marked weight."""
    origin: Origin | None = vars(parameter).get("origin")
    return None if origin is None else origin.name


def scale_of(parameters: Iterable[nn.Parameter]) -> LossScale | None:
    """The loss scale of the base that these weights stand on."""
    origins: list[Origin | None] = [vars(p).get("origin") for p in parameters]
    return next((o.scale for o in origins if o is not None and o.scale is not None), None)
