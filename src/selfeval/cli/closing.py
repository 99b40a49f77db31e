"""The table and the sentences that close a run."""

from __future__ import annotations

from pathlib import Path

__all__ = ["print_closing"]


def print_closing(folder: Path, worked: bool) -> None:
    """Print the summary of a run's report.json; `worked` is False when nothing was left to do."""
    from rich.console import Console
    from rich.table import Table

    from selfeval.report.page import draw_page
    from selfeval.report.summary import rounds_sentences, summary_rows, verdict_sentences
    from selfeval.store import read_json

    report = read_json(folder / "report.json")
    console = Console()
    if not worked:
        console.print(f"This run is finished; nothing was left to do in {folder}.", highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary_rows(report):
        table.add_row(name, value)
    console.print(table)
    for sentence in (*verdict_sentences(report), *rounds_sentences(report)):
        console.print(sentence, highlight=False, markup=False)
    page = folder / "index.html"
    if not page.exists():
        draw_page(folder)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
