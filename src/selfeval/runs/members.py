"""The trained evaluator of a run: its members, and the temperature of its confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.role_files import load_role
from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.errors import RunFolderError
from selfeval.quality.margin_signals import MARGIN_SIGNALS, MarginCalibration
from selfeval.quality.signed_regression import are_steps
from selfeval.store import read_object
from selfeval.texts import shortened
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import Member

__all__ = [
    "EVALUATOR_FILE",
    "Temperature",
    "confidence_of",
    "load_members",
    "member_roles",
    "reads_reference",
    "temperature_of",
]

EVALUATOR_FILE = "evaluator.json"
"""File in the folder of an evaluator: the units of its scores, the temperature, and whether it reads no reference answer."""


def member_roles(config: RunConfig) -> tuple[str, ...]:
    """Return the roles of the members: `evaluator-0`, `evaluator-1`, ..."""
    stem = EVALUATOR.removesuffix("0")
    return tuple(f"{stem}{number}" for number in range(config.evaluator.members))


def _saved(roles: Path, role: str, *keys: str) -> dict[str, Any]:
    remedy = (
        f"the stage evaluator writes it; run: selfeval run --output {roles.parent} (add --restart if the stage was finished)"
    )
    return read_object(roles / role / EVALUATOR_FILE, *keys, remedy=remedy)


def _number(saved: Mapping[str, Any], key: str, path: Path, *, positive: bool = False) -> float:
    """Return a finite number of evaluator.json. NaN or a standard deviation of 0 would make every score meaningless.

    Raises:
        RunFolderError: the value is something else.
    """
    value = saved[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (positive and value <= 0):
        kind = "a number above 0" if positive else "a finite number"
        raise RunFolderError(
            f"{path} is damaged: {key} is {shortened(repr(value))} instead of {kind}; restore it from a backup"
        )
    return float(value)


def load_members(backbone: Backbone, roles: Path, config: RunConfig) -> list[Member]:
    """Load the members from a folder of roles, except those that are already loaded.

    Args:
        backbone: backbone to load the roles into.
        roles: the folder `roles` of a run.
        config: configuration of the run; sets the number of members.

    Raises:
        RunFolderError: a file of a member is missing or damaged.
    """
    members = []
    for role in member_roles(config):
        if role not in backbone.roles.names:
            load_role(backbone, role, roles / role)
        saved, path = _saved(roles, role, "mean", "deviation"), roles / role / EVALUATOR_FILE
        mean, deviation = _number(saved, "mean", path), _number(saved, "deviation", path, positive=True)
        members.append(Member(role, mean, deviation, reads_reference(roles / role)))
    return members


def reads_reference(folder: Path) -> bool:
    """Return whether the evaluator in the folder of a role reads the reference answer, if the grade template shows one.

    Raises:
        RunFolderError: the file of the evaluator is damaged.
    """
    path = folder / EVALUATOR_FILE
    reads = read_object(path).get("reference_answer", True)
    if not isinstance(reads, bool):
        raise RunFolderError(
            f"{path} is damaged: reference_answer is {shortened(repr(reads))} instead of true or false; restore it from a "
            "backup"
        )
    return reads


@dataclass(frozen=True)
class Temperature:
    """Temperature of the confidence sigmoid(margin / value) of the ensemble.

    Attributes:
        value: temperature; 1 if it was not fitted.
        pairs: number of held-out pairs used for the fit; 0 if there were too few, so the confidence is not calibrated.
    """

    value: float
    pairs: int


def temperature_of(roles: Path) -> Temperature:
    """Read the temperature from a folder of roles; `pairs` is 0 if an older version did not write it."""
    saved = _saved(roles, EVALUATOR, "temperature")
    path = roles / EVALUATOR / EVALUATOR_FILE
    value = _number(saved, "temperature", path, positive=True)
    return Temperature(value, int(_number({"temperature_pairs": 0, **saved}, "temperature_pairs", path)))


def confidence_of(roles: Path) -> MarginCalibration | None:
    """Read the confidence of margin and disagreement from a folder of roles; None if the margin alone decides.

    Raises:
        RunFolderError: the file of the evaluator is damaged.
    """
    path = roles / EVALUATOR / EVALUATOR_FILE
    found = _saved(roles, EVALUATOR).get("confidence")
    if found is None:
        return None
    if not _is_confidence(found):
        names = ", ".join(MARGIN_SIGNALS)
        raise RunFolderError(
            f"{path} is damaged: confidence needs weights ({names}), scale and steps; restore it from a backup"
        )
    weights = {name: _number(found["weights"], name, path) for name in MARGIN_SIGNALS}
    return MarginCalibration(weights, _number(found, "scale", path), tuple(map(tuple, found["steps"])))


def _is_confidence(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == {"weights", "scale", "steps"}
        and isinstance(found["weights"], dict)
        and set(found["weights"]) == set(MARGIN_SIGNALS)
        and are_steps(found["steps"])
    )
