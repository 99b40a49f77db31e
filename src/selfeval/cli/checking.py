"""`selfeval check`: progress, output and exit code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from selfeval.errors import ConfigError

if TYPE_CHECKING:
    from selfeval.stages.terminal import Terminal
    from selfeval.suitability.checking import Check

__all__ = ["NOT_RECOMMENDED", "check_file", "finish", "progress"]

NOT_RECOMMENDED = 3
"""Exit code of a check that does not recommend a run."""


def check_file(output: Path | None) -> None:
    """Refuse a file that cannot be written, before minutes of work.

    Raises:
        ConfigError: its folder does not exist, or it is a folder.
    """
    if output is None:
        return
    if output.is_dir() or not output.parent.is_dir():
        why = "it is a folder" if output.is_dir() else f"the folder {output.parent} does not exist"
        raise ConfigError(f"--output {output}: {why}; pass a file in an existing folder, such as check.json")


@contextmanager
def progress(terminal: Terminal, minutes: float) -> Iterator[Callable[[float, str], None]]:
    """Show the seconds that are spent, and the current step, as a bar on a terminal and as lines elsewhere."""
    with terminal.bar("check", round(minutes * 60)) as bar:

        def report_progress(seconds: float, text: str) -> None:
            bar.say(text)
            bar.advance(int(seconds) - bar.done)

        yield report_progress


def finish(
    check: Check,
    model: str | None,
    seeds: Path | None,
    assignments: Sequence[str],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Print the check, write it to the file, and exit with `NOT_RECOMMENDED` if no run is recommended.

    Args:
        check: the result.
        model, seeds, assignments: as given to the command.
        output: Optional. File for the JSON.
        as_json: print JSON instead of tables.
    """
    from selfeval.store import write_file
    from selfeval.suitability.recommendation import run_command
    from selfeval.suitability.table import print_check

    decision = check.decision
    command = None if decision.judge is None else run_command(decision, model, str(seeds) if seeds else None, assignments)
    text = json.dumps({**check.as_json(), "command": command}, indent=2, ensure_ascii=False)
    if output is not None:
        write_file(output, f"{text}\n")
    if as_json:
        typer.echo(text)
    else:
        print_check(check, command)
    if command is None:
        raise typer.Exit(NOT_RECOMMENDED)
