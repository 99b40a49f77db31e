"""Read the estimates that the stage verdicts makes of a judge: accuracies of combined judges, or a calibration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfeval.config import CombinedConfig, VerdictsConfig
from selfeval.errors import RunFolderError
from selfeval.judging.protocol import JudgeFit
from selfeval.quality.judge_calibration import Calibration
from selfeval.quality.judge_signals import SIGNALS, SignalCalibration
from selfeval.quality.signed_regression import are_steps
from selfeval.store import read_object

__all__ = ["FIT_FILE", "has_fit", "read_fit"]

FIT_FILE = "judge_fit.json"
"""File in the folder of a round, only for a judge with something to estimate (`has_fit`)."""


def has_fit(config: VerdictsConfig) -> bool:
    """Return whether the stage verdicts estimates something for this judge."""
    return config.fits_consistency or isinstance(config.settings, CombinedConfig)


def read_fit(config: VerdictsConfig, root: Path) -> JudgeFit:
    """Return what was estimated for the judge of a round; nothing if there is nothing to estimate.

    Args:
        config: settings of the verdicts.
        root: folder of the round.

    Raises:
        RunFolderError: the judge is combined and the stage verdicts has not estimated its accuracies yet, or the file is
            damaged.
    """
    path = root / FIT_FILE
    if isinstance(config.settings, CombinedConfig):
        return JudgeFit(accuracies=_accuracies(path, config.settings))
    # A run whose labels are from a file has none: its judge is not calibrated.
    if not config.fits_consistency or not path.is_file():
        return JudgeFit()
    return JudgeFit(calibration=_calibration(path) if config.calibration.map == "slope" else _signals(path))


def _accuracies(path: Path, combined: CombinedConfig) -> tuple[float, ...]:
    names = list(combined.judges)
    if not path.is_file():
        raise RunFolderError(
            f"{path.parent} has no accuracies of {', '.join(names)} yet, which the stage verdicts estimates; "
            "`selfeval run` runs it (with pairs.file it judges nothing, so there are none: use a judge that is not combined)"
        )
    values = read_object(path, "judges", "accuracies")
    judges, accuracies = values["judges"], values["accuracies"]
    is_valid = isinstance(accuracies, list) and all(type(a) is float and 0.0 < a < 1.0 for a in accuracies)
    if judges != names or not is_valid or len(accuracies) != len(names):
        raise RunFolderError(
            f"{path} is damaged: expected the judges {', '.join(names)} and their accuracies, numbers between 0 and 1; remove "
            "it, and rerun the command"
        )
    return tuple(accuracies)


def _calibration(path: Path) -> Calibration | None:
    found = read_object(path, "calibration")["calibration"]
    if found is None:
        return None
    names = ("slope", "truncated_slope", "bias")
    if (
        not isinstance(found, dict)
        or set(found) != set(names)
        or not all(map(_is_number, found.values()))
        or min(found["slope"], found["truncated_slope"]) < 0
    ):
        raise RunFolderError(
            f"{path} is damaged: expected a calibration with {', '.join(names)}, or null; remove it, and rerun the command"
        )
    return Calibration(**found)


def _signals(path: Path) -> SignalCalibration | None:
    found = read_object(path, "calibration")["calibration"]
    if found is None:
        return None
    names = [field.name for field in dataclasses.fields(SignalCalibration)]
    if not isinstance(found, dict) or set(found) != set(names) or not _are_signals(found):
        raise RunFolderError(
            f"{path} is damaged: expected a calibration with {', '.join(names)}, or null; remove it, and rerun the command"
        )
    return SignalCalibration(**{**found, "steps": tuple(map(tuple, found["steps"]))})


def _are_signals(found: Mapping[str, Any]) -> bool:
    weights = found["weights"]
    return (
        isinstance(weights, dict)
        and set(weights) == set(SIGNALS)
        and all(map(_is_number, (*weights.values(), found["bias"], found["scale"])))
        and found["scale"] >= 0
        and found["of"] in ("looks", "pairs")
        and are_steps(found["steps"])
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
