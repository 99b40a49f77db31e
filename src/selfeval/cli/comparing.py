"""`selfeval compare`: the figures of a comparison on one screen.

On a terminal they are tables. Elsewhere each row is one line with tabs between its cells, and begins with the name of its
table, for `selfeval compare | grep ^rank | cut -f2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from selfeval.cli.closing import print_line
from selfeval.cli.judge_figures import text_table
from selfeval.texts import visible

if TYPE_CHECKING:
    from rich.console import Console

    from selfeval.policy_comparison.result import PolicyComparison

__all__ = ["print_comparison"]


def print_comparison(result: PolicyComparison, output: Path | None = None, console: Console | None = None) -> None:
    """Print the ranks and the pairs by each judge, the correctness by gold, and the sentences of the comparison."""
    from rich.console import Console

    from selfeval.policy_comparison.result import (
        GOLD_HEADER,
        PAIR_HEADER,
        RANK_HEADER,
        gold_rows,
        pair_rows,
        rank_rows,
        sentences,
    )

    console = console or Console()
    asked = result.questions
    print_line(console, f"{len(asked.used):,} questions of {asked.common:,} that all policies have in common")
    for judge in result.judges:
        print_line(console, f"judged by {judge.judge} of {result.judge_run}")
        _rows(console, "rank", RANK_HEADER, rank_rows(judge))
        _rows(console, "pair", PAIR_HEADER, pair_rows(judge))
    if result.gold is not None:
        _rows(console, "gold", GOLD_HEADER, gold_rows(result.gold))
    for sentence in sentences(result):
        print_line(console, sentence)
    if output is not None:
        print_line(console, f"Page: {output / 'index.html'}")


def _rows(console: Console, kind: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if console.is_terminal:
        console.print(text_table(header, [[visible(cell) for cell in row] for row in rows]))
        return
    for row in rows:
        typer.echo("\t".join([kind, *map(visible, row)]))
