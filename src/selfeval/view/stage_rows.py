"""The stages of a round as rows of a table: state, time, counts, and the progress of the one in progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfeval.report.figures import duration, finite, number
from selfeval.runs.activity import STOPPED, Activity
from selfeval.runs.reader import RunReader
from selfeval.stages import STAGE_NAMES
from selfeval.stages.time_left import in_words
from selfeval.store import Progress
from selfeval.texts import format_bytes

__all__ = ["Now", "StageRow", "now", "stage_rows"]

_RECORDS = {"questions": "questions", "replies": "replies", "verdicts": "verdicts", "pairs": "pairs", "policy": "sampled",
            "evaluation": "compared", "report": "report"}  # fmt: skip
"""Page with the records of each stage."""
_TUNING = "tuning"


@dataclass(frozen=True)
class StageRow:
    """A stage.

    Attributes:
        name: its name.
        state: `finished`, `running`, `interrupted`, `stopped` or `waiting`.
        seconds: time so far, over all attempts, as text; empty if unknown.
        counts: what it counted when it finished, as text.
        memory: peak of the process's memory at its end, as text.
        page: page with its records; empty if there is none yet.
    """

    name: str
    state: str
    seconds: str = ""
    counts: str = ""
    memory: str = ""
    page: str = ""


@dataclass(frozen=True)
class Now:
    """The progress of the stage in progress, as text.

    Attributes:
        stage: name of the stage, with the round if there are several.
        step: what is counted, or a step of unknown length; empty if it is the stage itself.
        count: such as `40 of 96`; empty if the number of units is unknown.
        share: share that is done, from 0 to 1; None if unknown.
        left: estimate of the time left; empty if it is too early for one.
        rate: units per second; empty if unknown.
        elapsed: time since this process began the stage.
        figures: a few live figures.
    """

    stage: str
    step: str
    count: str
    share: float | None
    left: str
    rate: str
    elapsed: str
    figures: str


def now(found: Activity, rounds: int) -> Now | None:
    """Return the progress of a run; None if no process is working on it, or if it writes no progress."""
    progress = found.progress
    if not found.is_running or progress is None:
        return None
    share = min(1.0, progress.done / progress.total) if progress.total else None
    return Now(
        stage=_stage_words(progress, rounds),
        step="" if progress.step == progress.stage else progress.step,
        count=f"{int(progress.done):,} of {max(int(progress.total), int(progress.done)):,}" if progress.total else "",
        share=share,
        left="" if progress.seconds_left is None or share == 1 else f"{in_words(progress.seconds_left)} left",
        rate=f"{number(progress.rate)} per second" if progress.rate else "",
        # Whole seconds: it changes at every look anyway.
        elapsed=duration(round(progress.seconds)).replace(".0 s", " s") if progress.stage else "",
        figures=progress.figures,
    )


def _stage_words(progress: Progress, rounds: int) -> str:
    if not progress.stage:
        return "starting"
    return f"round {progress.round}, {progress.stage}" if rounds > 1 else progress.stage


def stage_rows(reader: RunReader, found: Activity) -> list[StageRow]:
    """Return the stages of a round in order, those that have not begun too.

    Args:
        reader: the round.
        found: activity of the run.
    """
    run = reader.run
    rows: Mapping[str, Mapping[str, Any]] = run.get("stages") or {}
    names = [_TUNING]
    if run.get("kind") != _TUNING:
        names = [name for name in STAGE_NAMES if name != "steps" or reader.config.steps.enabled]
    current = _current(reader, found, names, rows)
    return [_row(reader, name, rows.get(name, {}), found, is_current=name == current) for name in names]


def _current(reader: RunReader, found: Activity, names: list[str], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the stage that is in progress, or was when the process ended; empty if none is known."""
    if found.progress is not None:
        return found.progress.stage if found.progress.round == reader.round else ""
    # Without progress, the first stage without its manifest; a later round may be the one in progress.
    if found.status in ("running", STOPPED) and len(reader.rounds) == 1:
        return next((name for name in names if not reader.is_finished(name)), "")
    return ""


def _row(reader: RunReader, name: str, row: Mapping[str, Any], found: Activity, *, is_current: bool) -> StageRow:
    state = str(row.get("state") or "waiting")
    if is_current and found.status in ("running", STOPPED):
        state = found.status
    seconds = float(row.get("seconds") or 0.0)
    if is_current and found.progress is not None:
        seconds += found.progress.seconds
    peak = finite(row.get("peak_bytes"))
    has_records = state != "waiting" and (reader.folder / name).is_dir()
    return StageRow(
        name=name,
        state=state,
        seconds=duration(seconds) if seconds else "",
        counts=", ".join(f"{key.replace('_', ' ')} {_amount(value)}" for key, value in (row.get("counts") or {}).items()),
        memory="" if peak is None else format_bytes(peak),
        page=_RECORDS.get(name, "") if has_records else "",
    )


def _amount(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    known = finite(value)
    if known is None:
        return str(value)
    return f"{value:,}" if isinstance(value, int) else number(known)
