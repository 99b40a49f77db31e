"""Print a list of runs: a table on a terminal, tab-separated lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from selfeval.texts import safe_json, visible

if TYPE_CHECKING:
    from rich.console import Console

    from selfeval.quality.statistics import Figure
    from selfeval.runs.listing import ListedRun

__all__ = ["print_runs"]

_NARROW = 100
"""Width in columns below which a run takes several lines."""
_COLUMNS = ("run", "status", "stage", "model", "changed", "figures")
_NAMES = {
    "accuracy_gold": "accuracy (gold)",
    "accuracy_judge": "accuracy (judge)",
    "win_rate": "win rate",
    "gold_before": "gold before",
    "gold_after": "gold after",
}


def print_runs(runs: Sequence[ListedRun], folder: Path, *, as_json: bool) -> None:
    """Print the runs.

    Args:
        runs: the runs.
        folder: where they were found, for the message if there are none.
        as_json: one JSON object per line, with all figures and intervals.
    """
    from rich.console import Console

    if as_json:
        for run in runs:
            typer.echo(safe_json(run.as_json()))
        return
    if not runs:
        typer.echo(f"no runs in {visible(str(folder))}", err=True)
    console = Console()
    rows = [_row(run) for run in runs]
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join(row))
    elif console.width < _NARROW:
        for row in rows:
            _print_block(console, row)
    elif rows:
        _print_table(console, rows)


def _row(run: ListedRun) -> tuple[str, ...]:
    """Return the cells of a run; a run that cannot be read has the reason in place of figures."""
    model = Path(run.model).name if Path(run.model).is_absolute() else run.model
    changed = "" if run.changed is None else f"{run.changed:%Y-%m-%d %H:%M}"
    said = run.problem or ", ".join(f"{_NAMES[name]} {_short(figure)}" for name, figure in run.figures.items())
    return tuple(map(visible, (str(run.folder), run.status or "unreadable", run.stage, model, changed, said)))


def _short(figure: Figure) -> str:
    interval = "" if figure.ci_low is None or figure.ci_high is None else f" [{figure.ci_low:.0%}, {figure.ci_high:.0%}]"
    return f"{figure.known:.0%}{interval}"


def _print_block(console: Console, row: Sequence[str]) -> None:
    from rich.text import Text

    folder, *rest = row
    console.print(Text(folder, style="bold", overflow="fold"))
    for text in (", ".join(filter(None, rest[:2])), ", ".join(filter(None, rest[2:4])), rest[4]):
        if text:
            console.print(Text(f"  {text}", overflow="fold"))


def _print_table(console: Console, rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, overflow="fold", no_wrap=name in ("status", "changed"))
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    console.print(table)
