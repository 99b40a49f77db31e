"""A replay buffer: the last steps of all environments, sampled at random.

Shapes: E environments, B batch, O observation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from environments import Step


class Transitions(NamedTuple):
    """Transitions of one update."""

    observations_BO: Tensor
    actions: Tensor  # [B] choices or [B, A] numbers
    rewards_B: Tensor
    terminated_B: Tensor  # nothing follows; an episode that was cut by its time limit is not terminated
    successors_BO: Tensor


class Replay:
    """A ring of `size` transitions."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self._columns: list[Tensor] = []

    def add(self, observations_EO: Tensor, actions: Tensor, step: Step) -> None:
        """Store one step of every environment in place of the oldest."""
        news = (observations_EO, actions, step.rewards_E, step.terminated_E, step.successors_EO)
        if not self._columns:
            self._columns = [new.new_empty(self.size, *new.shape[1:]) for new in news]
        places = torch.arange(self.count, self.count + len(actions)) % self.size
        for column, new in zip(self._columns, news, strict=True):
            column[places] = new
        self.count += len(actions)

    def draw(self, batch: int) -> Transitions:
        """Draw transitions uniformly with replacement."""
        rows = torch.randint(min(self.count, self.size), (batch,))
        return Transitions(*(column[rows] for column in self._columns))
