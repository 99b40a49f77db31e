"""The training curves of a round, drawn from its metrics as in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selfeval.errors import InputError, RunFolderError
from selfeval.report.schema import Alarm
from selfeval.report.sections import evaluator_curves, metric_curves, policy_curves
from selfeval.store import read_metrics
from selfeval.view.drawn import Drawn, version_of

__all__ = ["Curves", "alarms_of", "curves_of"]

_STAGES = ("policy", "evaluator", "steps", "tuning")
_DRAWN: Drawn[list[Curves]] = Drawn(share=0.05)


@dataclass(frozen=True)
class Curves:
    """The charts of one stage.

    Attributes:
        stage: its name.
        steps: number of steps that were logged.
        shown: title, caption and picture of the main charts.
        more: the others.
        problem: why its metrics cannot be read; empty if they can.
    """

    stage: str
    steps: int = 0
    shown: Sequence[dict[str, Any]] = ()
    more: Sequence[dict[str, Any]] = ()
    problem: str = ""


def curves_of(folder: Path) -> list[Curves]:
    """Return the charts of every stage of a round that has logged metrics, the last stage first."""
    paths = [_path(folder, stage) for stage in (*_STAGES, "watchdogs")]
    return _DRAWN.get(folder, version_of(paths), lambda: _draw(folder))


def _draw(folder: Path) -> list[Curves]:
    found = [_curves(folder, stage) for stage in _STAGES if _path(folder, stage).is_file()]
    return [curves for curves in found if curves.steps or curves.problem]


def _curves(folder: Path, stage: str) -> Curves:
    try:
        rows = read_metrics(_path(folder, stage))
        if stage == "policy":
            shown, more = policy_curves(rows, alarms_of(folder))
            return Curves(stage, len(rows), [view for view in shown if view["picture"]], [v for v in more if v["picture"]])
        drawn = evaluator_curves(rows) if stage == "evaluator" else metric_curves(rows)
    except InputError as error:
        return Curves(stage, problem=str(error))
    return Curves(stage, len(rows), [view for view in drawn if view["picture"]])


def alarms_of(folder: Path) -> list[Alarm]:
    """Return the alarms of the watchdogs of a round, in order.

    Raises:
        RunFolderError: the file is damaged, or an incompatible version wrote it.
    """
    path = _path(folder, "watchdogs")
    try:
        return [Alarm.model_validate(row) for row in read_metrics(path)]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RunFolderError(
            f"{path} has an alarm that this version cannot read ({place}: {first['msg']}); read the run with its version"
        ) from error


def _path(folder: Path, stage: str) -> Path:
    return folder / "metrics" / f"{stage}.jsonl"
