"""Recorders store the checkpoints, samples and metrics of policy training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.optim import AdamW

from selfeval.backbone.roles import Backbone
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.context import Samples, Scores
from selfeval.training.watchdogs import Alarm

__all__ = ["CheckpointRecorder", "Recorder"]


class Recorder(Protocol):
    """Stores the checkpoints, samples and metrics of a training, and reports its progress."""

    def checkpoints(self, roles: Sequence[str], optimizers: Mapping[str, AdamW]) -> Checkpoints:
        """Create the checkpoint manager of these roles and optimizers."""
        ...

    def resumed(self, iteration: int) -> None:
        """Record that training starts after this iteration; 0 for a new training."""
        ...

    def samples(self, iteration: int, samples: Samples, scores: Scores) -> None:
        """Record an iteration's replies with their scores."""
        ...

    def metrics(self, values: dict[str, float], alarms: Sequence[Alarm]) -> None:
        """Record an iteration's metrics and the alarms of the watchdogs."""
        ...

    def rolled_back(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        """Record that the training went back to a checkpoint, and the alarms that caused it.

        The metrics of later iterations no longer count: training repeats them, or ends with the policy of the checkpoint.
        """
        ...


@dataclass
class CheckpointRecorder:
    """A recorder that writes checkpoints and ignores everything else; subclasses record more.

    Attributes:
        folder: where the checkpoints are stored.
        backbone: the model that has the roles.
    """

    folder: Path
    backbone: Backbone

    def checkpoints(self, roles: Sequence[str], optimizers: Mapping[str, AdamW]) -> Checkpoints:
        return Checkpoints(self.folder, self.backbone, roles, optimizers)

    def resumed(self, iteration: int) -> None:
        pass

    def samples(self, iteration: int, samples: Samples, scores: Scores) -> None:
        pass

    def metrics(self, values: dict[str, float], alarms: Sequence[Alarm]) -> None:
        pass

    def rolled_back(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        pass
