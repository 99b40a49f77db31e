"""The page of a run in progress or finished: stages, curves, samples, watchdogs, memory, configuration and log."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError

from selfeval.errors import InputError
from selfeval.report.memory import event_rows
from selfeval.report.reading import read_report
from selfeval.report.schema import Alarm, MemoryEvent
from selfeval.report.sections import config_tables
from selfeval.report.summary import warnings
from selfeval.runs.activity import STOPPED, Activity, activity
from selfeval.runs.reader import RunReader
from selfeval.stages.run_log import LOG
from selfeval.texts import visible
from selfeval.view.curves import alarms_of, curves_of
from selfeval.view.drawn import Drawn, version_of
from selfeval.view.live import FAST, SLOW, live_page
from selfeval.view.opened import RunName
from selfeval.view.pages import PageRoute, opened_runs
from selfeval.view.samples import Sample, newest_samples
from selfeval.view.stage_rows import StageRow, now, stage_rows

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_ERRORS = "error.log"
_TAIL_BYTES, _TAIL_LINES = 1 << 16, 200
_WARNINGS: Drawn[Sequence[str]] = Drawn()


@router.get("/run/{run}")
def overview(run: RunName, request: Request) -> Response:
    """Show the state of a run, or of one of its rounds."""
    reader = opened_runs(request).reader(run)
    root = reader.root
    first = reader if reader.round == 1 else RunReader(root)
    found, rounds = activity(root, first.status), first.rounds
    stages, working = stage_rows(reader, found), now(found, len(rounds))
    alarms, samples, problems = _watched(reader)
    return live_page(
        request,
        "overview",
        title=run,
        run=run,
        tab="overview",
        name=str(reader.run.get("name") or run),
        status=found.status,
        folder=root,
        facts=_facts(reader),
        rounds=_rounds(run, len(rounds), reader.round),
        now=working,
        stages=stages,
        curves=curves_of(reader.folder),
        alarms=alarms,
        samples=samples,
        problems=problems,
        warnings=_warnings(reader),
        memory=_memory(reader),
        config=config_tables(reader.config.model_dump(mode="json")),
        logs=[(name, text) for name in (LOG, _ERRORS) if (text := _tail(root / name))],
        refresh=FAST if found.is_running else SLOW,
        announce=_announce(found, stages),
    )


def _announce(found: Activity, stages: Sequence[StageRow]) -> str:
    """Return the sentence about the state that a screen reader reads when it changes."""
    finished = sum(stage.state == "finished" for stage in stages)
    progress = f"{finished} of {len(stages)} stages are finished."
    if not found.is_running:
        return f"The run is {'not in progress' if found.status in (STOPPED, 'unknown') else found.status}. {progress}"
    current = next((stage.name for stage in stages if stage.state == "running"), "")
    return f"The stage {current} is in progress. {progress}" if current else f"The run is in progress. {progress}"


def _facts(reader: RunReader) -> list[tuple[str, str]]:
    config, run = reader.config, reader.run
    model = Path(config.model).name if Path(config.model).is_absolute() else config.model
    device = run.get("device") or {}
    changed = datetime.fromtimestamp((reader.folder / "run.json").stat().st_mtime).astimezone()
    facts = [
        ("model", model),
        ("precision", str(device.get("precision") or "")),
        ("device", str(device.get("device") or "")),
        ("domain", config.domain or "your own questions"),
        ("seed", str(run.get("seed", ""))),
        ("learner", "" if run.get("kind") else config.policy.learner),
        ("last change", f"{changed:%Y-%m-%d %H:%M:%S}"),
    ]
    return [(name, value) for name, value in facts if value]


def _rounds(run: RunName, count: int, shown: int) -> list[tuple[str, str, bool]]:
    """Return the address, the words and whether it is shown, of every round of a run with several."""
    base = run.rpartition("@")[0] if shown > 1 else run.removesuffix("@1")
    names = {number: base if number == 1 else f"{base}@{number}" for number in range(1, count + 1)}
    found = [(name, f"Round {number}", number == shown) for number, name in names.items()]
    return found if count > 1 else []


def _watched(reader: RunReader) -> tuple[list[Alarm], list[Sample], list[str]]:
    """Return alarms and samples, and why they cannot be read."""
    problems: list[str] = []
    alarms: list[Alarm] = []
    samples: list[Sample] = []
    try:
        alarms = alarms_of(reader.folder)
        samples = newest_samples(reader)
    except (InputError, ValidationError, TypeError, ValueError) as error:
        problems.append(str(error))
    return alarms, samples, problems


def _warnings(reader: RunReader) -> Sequence[str]:
    """Return the warnings of the report, and what was decided about the device."""
    path = reader.folder / "report.json"
    notes = [str(note) for note in (reader.run.get("device") or {}).get("notes", [])]
    if not path.is_file():
        return notes
    try:
        return [*_WARNINGS.get(path, version_of([path]), lambda: warnings(read_report(path))), *notes]
    except InputError as error:
        return [str(error), *notes]


def _memory(reader: RunReader) -> list[tuple[str, str]]:
    return event_rows(list(_events(reader)))


def _events(reader: RunReader) -> Iterator[MemoryEvent]:
    for name, row in reader.stages.items():
        for event in row.get("memory_events") or []:
            try:
                yield MemoryEvent.model_validate({"stage": name, **event})
            except ValidationError:
                continue  # of another version


def _tail(path: Path) -> str:
    """Return the last lines of a log; empty without one."""
    try:
        if not path.is_file() or path.is_symlink():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            data = file.read(_TAIL_BYTES)
    except OSError:
        return ""
    return visible("\n".join(data.decode("utf-8", errors="replace").splitlines()[-_TAIL_LINES:]), keep="\n")
