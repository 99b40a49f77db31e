"""The trained evaluators of a run: where they lie, how they are loaded, and the scorer that they make together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.stages.context import Context
from selfeval.store import read_object
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import EvaluatorScorer, Member, Pessimism

__all__ = ["Temperature", "ensure_evaluators", "load_members", "member_roles", "scorer_of", "temperature_of"]


def member_roles(config: RunConfig) -> tuple[str, ...]:
    """`evaluator-0`, `evaluator-1`, ...: one role for each member."""
    stem = EVALUATOR.removesuffix("0")
    return tuple(f"{stem}{number}" for number in range(config.evaluator.members))


def _saved(roles: Path, role: str, *keys: str) -> dict[str, Any]:
    remedy = f"the stage evaluator writes it: selfeval run --output {roles.parent} (with --restart if it was finished)"
    return read_object(roles / role / "evaluator.json", *keys, remedy=remedy)


def load_members(backbone: Backbone, roles: Path, config: RunConfig) -> list[Member]:
    """The members that lie in a folder of roles, loaded unless they are there already."""
    members = []
    for role in member_roles(config):
        if role not in backbone.roles:
            backbone.load_role(role, roles / role)
        saved = _saved(roles, role, "mean", "deviation")
        members.append(Member(role, float(saved["mean"]), float(saved["deviation"])))
    return members


@dataclass(frozen=True)
class Temperature:
    """Temperature of the confidence sigmoid(margin / value) of the evaluators together.

    Attributes:
        value: 1 where it was not fitted.
        pairs: held-out pairs that it was fitted on; 0 where they were too few, so that the confidence is not calibrated.
    """

    value: float
    pairs: int


def temperature_of(roles: Path) -> Temperature:
    """The temperature in a folder of roles; `pairs` is 0 where an older version did not write it."""
    saved = _saved(roles, EVALUATOR, "temperature")
    return Temperature(float(saved["temperature"]), int(saved.get("temperature_pairs", 0)))


def ensure_evaluators(context: Context) -> None:
    """Loads the trained evaluators into the backbone unless they are there."""
    load_members(context.backbone, context.store.root / "roles", context.config)


def scorer_of(context: Context, pessimism: Pessimism = "mean") -> EvaluatorScorer:
    """The evaluators together, as evidence uses them (their mean) or as the policy is trained on them."""
    config = context.config
    members = load_members(context.backbone, context.store.root / "roles", config)
    return EvaluatorScorer(context.backbone, config.batch_tokens, members, pessimism, config.policy.uncertainty_weight)
