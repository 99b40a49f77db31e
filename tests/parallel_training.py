"""Trainings of a tiny model in the processes of a group: their gradients, metrics and weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import policies
from selfeval.backbone.process_group import SINGLE_PROCESS, ProcessGroup
from selfeval.backbone.roles import Backbone
from selfeval.config import EvaluatorConfig, TuningConfig
from selfeval.prompt import Prompt
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR, Preference, train_evaluator
from selfeval.training.sft import tune_on_text

__all__ = ["Trained", "train_alone", "train_in"]

PAIRS = [
    Preference(Prompt((31, 12 + i, 20)), tuple(range(5, 8 + i % 3)), tuple(range(9, 13 + i % 5)), 0.2 + 0.1 * (i % 7))
    for i in range(14)
]
ROWS = [tuple((7 * i + j * (i + 3)) % 30 + 2 for j in range(5 + 3 * (i % 4))) for i in range(12)]


@dataclass
class Trained:
    """Outcome of a training in one process.

    Attributes:
        gradients: gradients of the first steps, before clipping has any effect.
        lines: metrics.
        weights: final weights of the trained roles.
        share: storage of the base in this process, in copies of its parameters.
    """

    gradients: list[Tensor] = field(default_factory=list)
    lines: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    share: float = 0.0


@contextmanager
def _noting(found: list[Tensor], most: int) -> Iterator[None]:
    """Keep the gradients of the first optimizer steps, as one flat tensor each."""

    def note(optimizer: Optimizer, arguments: Any, settings: Any) -> None:
        if len(found) < most:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found.append(torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in parameters]))

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def train_in(group: ProcessGroup, kind: str, folder: Path, settings: dict[str, Any], steps: int = 4) -> Trained:
    """Train the evaluator, a role on text, or a policy with the learner `kind`; resume from the checkpoints of the folder.

    Args:
        group: the processes.
        kind: `evaluator`, `sft` or a learner.
        folder: of the checkpoints, shared by all processes.
        settings: settings of the training.
        steps: number of steps whose gradients are kept.
    """
    backbone, found = policies.four_roles(), Trained()
    backbone.budget.processes = group
    with _noting(found.gradients, steps):
        if kind == "evaluator":
            found.lines = _evaluator(backbone, folder, EvaluatorConfig(**settings))
        elif kind == "sft":
            found.lines = _text(backbone, folder, TuningConfig(**settings))
        else:
            config = policies.changed(policies.CONFIG, **{"learner": kind, "max_grad_norm": None, **settings})
            found.lines, _ = policies.train(backbone, folder, config)
    names = [name for name in backbone.roles.names if backbone.roles.parameters(name)]
    found.weights = {f"{role}/{n}": p.detach().clone() for role in names for n, p in backbone.roles.parameters(role).items()}
    found.share = backbone.census.weight_copies()
    return found


def train_alone(kind: str, folder: Path, settings: dict[str, Any], steps: int = 4) -> Trained:
    """Train in this process alone."""
    return train_in(SINGLE_PROCESS, kind, folder, settings, steps)


def _evaluator(backbone: Backbone, folder: Path, config: EvaluatorConfig) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    train_evaluator(
        backbone,
        PAIRS,
        config,
        lambda optimizers: Checkpoints(folder, backbone, [EVALUATOR], optimizers),
        seed=3,
        batch_tokens=80,
        log=lines.append,
        resumed=lambda step: None,
        held_out=PAIRS[:5],
    )
    return lines


def _text(backbone: Backbone, folder: Path, config: TuningConfig) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    tune_on_text(
        backbone,
        POLICY,
        ROWS,
        config,
        lambda optimizers: Checkpoints(folder, backbone, [POLICY], optimizers),
        seed=3,
        batch_tokens=40,
        log=lines.append,
    )
    return lines
