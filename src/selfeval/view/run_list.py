"""The list of all runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from selfeval.quality.statistics import Figure
from selfeval.report.figures import percent
from selfeval.runs.activity import activity
from selfeval.runs.listing import ListedRun, listed_run
from selfeval.view.drawn import Drawn, version_of
from selfeval.view.live import FAST, SLOW, live_page
from selfeval.view.opened import RunName
from selfeval.view.pages import PageRoute, opened_runs

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_NAMES = {
    "accuracy_gold": "evaluator accuracy, by gold",
    "accuracy_judge": "evaluator agrees with judge",
    "win_rate": "win rate",
    "gold_before": "gold before",
    "gold_after": "gold after",
}
_LISTED: Drawn[ListedRun] = Drawn(4096)


@dataclass(frozen=True)
class _Row:
    """A run in the table: its name in addresses, its row, and its status with that of its process."""

    name: RunName
    run: ListedRun
    status: str

    @property
    def model(self) -> str:
        """The model, without the folders of its path."""
        return Path(self.run.model).name if Path(self.run.model).is_absolute() else self.run.model

    @property
    def changed(self) -> str:
        return "" if self.run.changed is None else f"{self.run.changed:%Y-%m-%d %H:%M}"

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """Name, value and interval of each main figure."""
        return [(_NAMES[name], percent(figure.known), _interval(figure)) for name, figure in self.run.figures.items()]

    def has(self, text: str) -> bool:
        """Return whether a text is part of any of its cells."""
        cells = (self.name, self.run.name, self.status, self.run.stage, self.run.model, self.run.problem)
        return text.casefold() in "\n".join(cells).casefold()


def _interval(figure: Figure) -> str:
    return "" if figure.ci_low is None or figure.ci_high is None else f"{percent(figure.ci_low)} to {percent(figure.ci_high)}"


def _figure(name: str) -> Callable[[_Row], Any]:
    def value(row: _Row) -> float:
        # Runs without the figure come last.
        return -row.run.figures[name].known if name in row.run.figures else math.inf

    return value


_ORDERS: Mapping[str, tuple[str, Callable[[_Row], Any]]] = {
    "changed": ("last change", lambda row: -row.run.changed.timestamp() if row.run.changed else math.inf),
    "name": ("name", lambda row: row.name.casefold()),
    "status": ("status", lambda row: (not row.run.problem, row.status)),
    "model": ("model", lambda row: row.model.casefold()),
    "accuracy": ("evaluator accuracy", lambda row: min(map(_figure_of(row), ("accuracy_gold", "accuracy_judge")))),
    "gold_after": ("gold after", _figure("gold_after")),
    "win_rate": ("win rate", _figure("win_rate")),
}
"""Orders of the table: the words for them, and the key by which rows are sorted. Figures are sorted highest first."""


def _figure_of(row: _Row) -> Callable[[str], Any]:
    return lambda name: _figure(name)(row)


@router.get("/")
def run_list(request: Request, q: str = "", sort: str = "changed") -> Response:
    """Show all runs with their status and main figures."""
    rows = [_row(name, folder) for name, folder in opened_runs(request).named().items()]
    shown = sorted((row for row in rows if row.has(q.strip())), key=_ORDERS.get(sort, _ORDERS["changed"])[1])
    running = sum(row.status == "running" for row in rows)
    return live_page(
        request,
        "run_list",
        title="Runs",
        rows=shown,
        total=len(rows),
        q=q,
        sort=sort,
        orders=[(name, words) for name, (words, _) in _ORDERS.items()],
        folders=opened_runs(request).folders,
        refresh=FAST if running or not rows else SLOW,
        announce=f"{len(rows):,} {'run' if len(rows) == 1 else 'runs'}, {running:,} in progress.",
    )


def _row(name: RunName, folder: Path) -> _Row:
    # A run that cannot be read is read again every time: the reason may be in any of its files.
    rounds = sorted(folder.glob("rounds/*/run.json"))
    version = version_of([folder / "run.json", folder / "report.json", *rounds])
    found = _LISTED.get(folder, version, lambda: listed_run(folder))
    if found.problem:
        found = listed_run(folder)
    return _Row(name, found, activity(folder, found.status).status if found.status else "unreadable")
