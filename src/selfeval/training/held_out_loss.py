"""The held-out loss of a supervised training: measured before, during and after it; the weights with the lowest are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from selfeval.training.checkpoint import Checkpoints

__all__ = ["HeldOutLoss"]


class HeldOutLoss:
    """Measures a held-out loss and keeps the weights of the step with the lowest one.

    The untrained weights are measured too, but are not a candidate for the best step.

    Args:
        measure: returns the loss of the current weights, in any unit.
        every: steps between measurements; the last step is always measured.

    Attributes:
        best: step and loss of the best measurement so far; None before the first step.
        before: loss before the first step.
    """

    def __init__(self, measure: Callable[[], float], every: int) -> None:
        self._measure, self._every = measure, every
        self.before: float | None = None
        self.best: tuple[int, float] | None = None
        self._keeper: Checkpoints | None = None

    def begin(self, keeper: Checkpoints, state: Mapping[str, Any] | None) -> None:
        """Set the checkpoints of the training, and restore the result of `state` from the one that it resumes from."""
        self._keeper = keeper.beside("best")
        found = (state or {}).get("held_out")
        if found is not None:
            self.before = found["before"]
            self.best = None if found["best"] is None else (int(found["best"][0]), float(found["best"][1]))

    def start(self) -> dict[str, float]:
        """Measure the untrained weights and return the metrics of step 0."""
        self.before = self._measure()
        return {"step": 0, "held_out_loss": self.before}

    def look(self, step: int, steps: int) -> dict[str, float]:
        """Measure if it is due after this step, keep the weights if they are the best, and return the metrics."""
        if step % self._every and step < steps:
            return {}
        loss = self._measure()
        if self.best is None or loss < self.best[1]:
            self.best = (step, loss)
            assert self._keeper is not None
            self._keeper.save(step, {})
        return {"held_out_loss": loss}

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {"held_out": {"before": self.before, "best": None if self.best is None else list(self.best)}}

    def restore_best(self) -> None:
        """Restore the weights of the best step."""
        if self.best is not None:
            assert self._keeper is not None
            self._keeper.restore(self.best[0])
