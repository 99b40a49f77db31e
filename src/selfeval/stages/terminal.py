"""Progress display while the loop runs: bars on a terminal, plain lines elsewhere, nothing in quiet mode."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from selfeval.texts import visible

__all__ = ["Bar", "Terminal"]

_PLAIN_SECONDS = 10.0
"""Seconds between plain progress lines when standard error is not a terminal."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


class Bar:
    """Progress bar of one stage; `advance` counts units, `say` shows a few live figures after the bar."""

    def __init__(self, terminal: Terminal, name: str, total: int, done: int) -> None:
        self._terminal, self.name, self.total, self.done = terminal, name, total, done
        self._started, self._first, self._told = time.monotonic(), done, time.monotonic()
        self._figures = ""
        self._progress: Progress | None = None
        if terminal.is_live:
            self._progress = Progress(
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", style="dim"),
                console=terminal.console,
                transient=True,
            )
            self._task = self._progress.add_task(name, total=total, completed=done, figures="")
            self._progress.start()

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._progress:
            # A stage may finish more units than planned, and rich would show more than 100 %.
            self._progress.update(self._task, completed=self.done, total=max(self.total, self.done))
        elif not self._terminal.quiet and time.monotonic() - self._told > _PLAIN_SECONDS:
            self._told = time.monotonic()
            self._terminal.note(self._plain_line())

    def say(self, figures: str) -> None:
        self._figures = figures
        if self._progress:
            self._progress.update(self._task, figures=figures)

    def _plain_line(self) -> str:
        seconds = time.monotonic() - self._started
        # Units finished by an earlier process are not part of this process's speed.
        rate = (self.done - self._first) / max(seconds, 1e-9)
        left = f", {max(self.total - self.done, 0) / rate:.0f} s left" if rate > 0 else ""
        return f"{self.name}: {self.done}/{self.total}, {rate:.1f}/s{left} {self._figures}".rstrip()

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


class Terminal:
    """Output for progress.

    Args:
        quiet: show nothing but errors and the closing table.
        console: Optional. A rich console. Default: standard error, which keeps standard output clean.
        asks: whether questions may be asked on standard input.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None, *, asks: bool = True) -> None:
        self.quiet, self._asks = quiet, asks
        self.console = console or Console(stderr=True)

    @property
    def is_live(self) -> bool:
        return self.console.is_terminal and not self.quiet

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show a progress bar for a stage of `total` units, of which `done` are already finished."""
        bar = Bar(self, name, total, done)
        try:
            yield bar
        finally:
            bar.close()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a spinner (or a line) during a step of unknown length."""
        if self.is_live:
            with self.console.status(what):
                yield
        else:
            self.note(what)
            yield

    def ask(self, question: str) -> bool:
        """Ask the user a yes/no question. Return True for yes; False for no, or if nobody can be asked."""
        if not (self._asks and self.console.is_terminal and sys.stdin.isatty()):
            return False
        self.console.print(f"{question} [y/N] ", end="", highlight=False, markup=False)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def note(self, text: str) -> None:
        """Print one line for the user."""
        if not self.quiet:
            self._line(text)

    def _line(self, text: str) -> None:
        """Print one line. Output to a file is not wrapped, to keep it searchable."""
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=not self.console.is_terminal)
