"""The trained evaluator of a run: its members, and the temperature of its confidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.store import read_object
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import Member

__all__ = ["Temperature", "load_members", "member_roles", "temperature_of"]


def member_roles(config: RunConfig) -> tuple[str, ...]:
    """Return the roles of the members: `evaluator-0`, `evaluator-1`, ..."""
    stem = EVALUATOR.removesuffix("0")
    return tuple(f"{stem}{number}" for number in range(config.evaluator.members))


def _saved(roles: Path, role: str, *keys: str) -> dict[str, Any]:
    remedy = f"the stage evaluator writes it: selfeval run --output {roles.parent} (with --restart if it was finished)"
    return read_object(roles / role / "evaluator.json", *keys, remedy=remedy)


def load_members(backbone: Backbone, roles: Path, config: RunConfig) -> list[Member]:
    """Load the members from a folder of roles, except those that are loaded already.

    Args:
        backbone: gets their roles.
        roles: the folder `roles` of a run.
        config: of the run; says how many members there are.

    Raises:
        RunFolderError: a file of a member is missing or damaged.
    """
    members = []
    for role in member_roles(config):
        if role not in backbone.roles:
            backbone.load_role(role, roles / role)
        saved = _saved(roles, role, "mean", "deviation")
        members.append(Member(role, float(saved["mean"]), float(saved["deviation"])))
    return members


@dataclass(frozen=True)
class Temperature:
    """Temperature of the confidence sigmoid(margin / value) of all members together.

    Attributes:
        value: 1 where it was not fitted.
        pairs: held-out pairs that it was fitted on; 0 where they were too few, and the confidence is not calibrated.
    """

    value: float
    pairs: int


def temperature_of(roles: Path) -> Temperature:
    """Read the temperature from a folder of roles; `pairs` is 0 where an older version did not write it."""
    saved = _saved(roles, EVALUATOR, "temperature")
    return Temperature(float(saved["temperature"]), int(saved.get("temperature_pairs", 0)))
