"""List the runs under a folder, from their files alone, without a lock. A run that cannot be read has the reason in its row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from selfeval.errors import InputError
from selfeval.quality.statistics import Figure
from selfeval.report.figures import defined
from selfeval.report.reading import read_report
from selfeval.report.summary import evaluator_accuracy, undecided
from selfeval.runs.reader import RunReader

__all__ = ["ListedRun", "list_runs", "listed_run", "run_folders"]

_DEEPEST = 4
"""Number of levels of folders that are searched."""


@dataclass(frozen=True)
class ListedRun:
    """A run in a list.

    Attributes:
        folder: its folder.
        problem: why it cannot be read; empty if it can. The fields below are then those that could be read.
        name: its name.
        status: `running`, `finished`, `partial` or `interrupted`, as in run.json; a killed run stays `running`.
        stage: the last stage in run.json, of the last round that has begun, such as `policy` or `round 2, replies`.
        model: folder or hub id of its model.
        changed: when run.json was last written, in local time; it is written at the beginning and the end of every stage.
        figures: the main figures of the report by name, of those that were measured: the accuracy of the evaluator
            (`accuracy_gold` or `accuracy_judge`, by the source of the labels), and of the policy `win_rate`, `gold_before` and
            `gold_after`. Empty before the report.
    """

    folder: Path
    problem: str = ""
    name: str = ""
    status: str = ""
    stage: str = ""
    model: str = ""
    changed: datetime | None = None
    figures: dict[str, Figure] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        figures = {name: figure.as_json() for name, figure in self.figures.items()}
        changed = None if self.changed is None else self.changed.isoformat(timespec="seconds")
        return {**vars(self), "folder": str(self.folder), "changed": changed, "figures": figures}


def list_runs(folder: Path) -> list[ListedRun]:
    """Return the runs in a folder and its subfolders, by folder. The folder may itself be a run.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; pass one that contains run folders (default: runs)")
    return [listed_run(found) for found in run_folders(folder)]


def run_folders(folder: Path) -> list[Path]:
    """Return the folders with a run.json in a folder, which may itself be one, in order."""
    return list(_run_folders(folder, _DEEPEST))


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders with a run.json. Links are not followed, and the rounds inside of a run are part of it."""
    if os.path.lexists(folder / "run.json"):
        yield folder
        return
    try:
        inner = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:  # not readable for this user, or removed since
        return
    for path in inner if depth else ():
        if not path.name.startswith("."):
            yield from _run_folders(path, depth - 1)


def listed_run(folder: Path) -> ListedRun:
    """Return the row of a run; see `list_runs`."""
    found = ListedRun(folder)
    try:
        reader = RunReader(folder)
        run = reader.run
        changed = datetime.fromtimestamp((folder / "run.json").stat().st_mtime).astimezone()
        name, model = str(run.get("name", "")), reader.config.model
        found = replace(found, name=name, status=reader.status, model=model, changed=changed, stage=_stage(reader))
        return replace(found, figures=_figures(reader))
    except (InputError, OSError) as error:
        return replace(found, problem=str(error))


def _stage(reader: RunReader) -> str:
    *_, last = reader.rounds
    stage = next(reversed(last.stages), "")
    return f"round {last.round}, {stage}" if last.round > 1 and stage else stage


def _figures(reader: RunReader) -> dict[str, Figure]:
    path = reader.folder / "report.json"
    if not path.is_file():
        return {}
    reader.check([path])
    report = read_report(path)
    accuracy = evaluator_accuracy(report)
    # A win rate of one half because the referee decided nothing is no result.
    names = ("gold_before", "gold_after") if undecided(report.policy) else ("win_rate", "gold_before", "gold_after")
    policy = {name: defined(getattr(report.policy, name)) for name in names}
    figures = {f"accuracy_{accuracy[1]}": accuracy[0]} if accuracy else {}
    return figures | {name: figure for name, figure in policy.items() if figure is not None}
