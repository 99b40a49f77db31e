"""The summary table and sentences printed at the end of a run.

On a terminal they are wrapped to its width, however narrow. Elsewhere each is one line, with a tab between name and value, for
`selfeval run | grep` and `cut -f2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from selfeval.texts import visible

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_closing", "print_line"]

_NARROW = 60
"""Width in columns below which a value is put under its name."""


def print_closing(folder: Path, worked: bool) -> None:
    """Print the summary of a run's report.json; `worked` is False if nothing was left to do."""
    from rich.console import Console

    from selfeval.report.page import draw_page
    from selfeval.report.reading import read_report
    from selfeval.report.summary import rounds_sentences, summary_rows, verdict_sentences, warnings

    report = read_report(folder / "report.json")
    page = folder / "index.html"
    # The page can be deleted without making the report stage incomplete.
    if not page.exists():
        draw_page(folder)
    console = Console()
    if not worked:
        typer.echo(f"Nothing left to do: the run is already finished in {visible(str(folder))}.")
    _print_rows(console, summary_rows(report))
    for sentence in (*verdict_sentences(report), *rounds_sentences(report), *warnings(report)):
        print_line(console, sentence)
    typer.echo(f"Report: {visible(str(page))}")


def _print_rows(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    if not console.is_terminal:
        for name, value in rows:
            typer.echo(f"{visible(name.strip())}\t{visible(value)}")
        return
    from rich.table import Table
    from rich.text import Text

    if console.width < _NARROW:
        for name, value in rows:
            console.print(Text(f"{visible(name)}\n    {visible(value)}", overflow="fold"))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(visible(name)), Text(visible(value)))
    console.print(table)


def print_line(console: Console, text: str) -> None:
    """Print one sentence: wrapped on a terminal, on one line elsewhere."""
    if console.is_terminal:
        console.print(visible(text), highlight=False, markup=False, overflow="fold")
    else:
        typer.echo(visible(text))
