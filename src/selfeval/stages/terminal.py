"""Progress display while the loop runs: bars on a terminal, plain lines elsewhere, nothing in quiet mode."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from selfeval.stages.time_left import TimeLeft
from selfeval.store import Progress
from selfeval.texts import visible

__all__ = ["Bar", "Terminal"]

_LOGGER = logging.getLogger(__name__)
_PLAIN_SECONDS = 10.0
"""Seconds between plain progress lines in the log, and on standard error if it is not a terminal."""
_REDRAWS = 4
"""Redraws of a live bar per second."""
_WIDEST, _NARROWEST = 28, 8
"""Columns of a live bar. With less room than the narrowest there is no bar, only numbers."""
_SHORTEST_FIGURES = 12
"""Columns below which figures are left out rather than cut."""


def _shorter(name: str, text: str, room: int) -> str:
    """Return a part of the bar in fewer columns, where it has something to leave out."""
    if name == "left":
        return text.removesuffix(" left")
    if name == "figures" and room >= _SHORTEST_FIGURES:
        return f"{text[: room - 1]}…"
    return text


class Bar:
    """Progress bar of one stage; `advance` counts units, `say` shows a few live figures after the bar."""

    def __init__(self, terminal: Terminal, name: str, total: int, done: int) -> None:
        self._terminal, self.name, self.total, self.done = terminal, name, total, done
        self._started = self._last_line = time.monotonic()
        self._time_left = TimeLeft(total, done, self._started)
        self._within, self._figures = 0.0, ""
        self._live: Live | None = None
        if terminal.is_live:
            # It asks `__rich_console__` for a new line at every redraw, so that the times move on without news.
            self._live = Live(self, console=terminal.console, transient=True, refresh_per_second=_REDRAWS)
            self._live.start()

    def advance(self, count: int = 1, within: float = 0.0) -> None:
        """Count finished units; `within` is what is done of others that are in progress."""
        self.done += count
        self.within(within)

    def within(self, units: float) -> None:
        """Show how much of the units in progress is done, such as 40.5 of the 512 questions of a shard."""
        self._within = units
        self._time_left.update(self._reached, time.monotonic())
        if time.monotonic() - self._last_line > _PLAIN_SECONDS:
            self._last_line, line = time.monotonic(), self._plain_line()
            _LOGGER.debug(line)
            if self._live is None:
                self._terminal.show(line)

    def say(self, figures: str) -> None:
        self._figures = figures

    @property
    def _reached(self) -> float:
        """Units that are done, with the part of those in progress."""
        return self.done + self._within

    def progress(self) -> Progress:
        """Return its state for readers in other processes."""
        left = self._time_left.seconds(time.monotonic())
        return Progress(
            step=self.name,
            done=self._reached,
            total=float(self.total),
            rate=self._time_left.rate,
            seconds_left=left,
            figures=self._figures,
        )

    @property
    def _count(self) -> str:
        # A stage may finish more units than planned.
        return f"{int(self._reached)}/{max(self.total, int(self._reached))}"

    def _plain_line(self) -> str:
        left = self._time_left.words(time.monotonic())
        parts = [self._count, f"{self._time_left.rate:.1f}/s", *([f"{left} left"] if left else [])]
        return f"{self.name}: {', '.join(parts)} {self._figures}".rstrip()

    # -- a live bar -----------------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the bar as a single line, whatever the width: a wrapped line would leave its beginning behind."""
        # The last column stays empty, because some terminals move to the next line when it is written.
        yield self._line(console, options, options.max_width - 1)

    def _line(self, console: Console, options: ConsoleOptions, width: int) -> Text:
        shown, columns = self._fitting(width)
        line = Text(self.name, style="bold")
        if columns:
            line.append(" ")
            drawn = ProgressBar(max(self.total, self._reached), self._reached, width=columns)
            for segment in console.render(drawn, options.update_width(columns)):
                line.append(segment.text, segment.style)
        for name in ("count", "share", "rate", "elapsed", "left", "figures"):
            if name in shown:
                line.append(f" {shown[name]}", "not bold dim" if name == "figures" else "not bold")
        line.truncate(width, overflow="ellipsis")
        return line

    def _fitting(self, width: int) -> tuple[dict[str, str], int]:
        """Return what is shown in so many columns, the most useful first, and the columns of the bar."""
        shown, columns, room = {"count": self._count}, 0, width - len(self.name) - 1 - len(self._count)
        for name, text in self._optional().items():
            if len(text) >= room:
                text = _shorter(name, text, room - 1)
            if text and len(text) < room:
                shown[name] = text
                room -= len(text) + 1
        if "bar" in shown:
            columns = _NARROWEST + min(_WIDEST - _NARROWEST, max(0, room))
        return shown, columns

    def _optional(self) -> dict[str, str]:
        """Return the parts that are left out where there is no room, the most useful first."""
        now = time.monotonic()
        left, minutes = self._time_left.words(now), int(now - self._started) // 60
        return {
            "left": f"{left} left" if left else "",
            "bar": " " * _NARROWEST,
            "share": f"{min(1.0, self._reached / self.total):.0%}" if self.total else "",
            "figures": self._figures,
            "rate": f"{self._time_left.rate:.1f}/s" if self._time_left.rate else "",
            "elapsed": f"{minutes // 60}:{minutes % 60:02}:{int(now - self._started) % 60:02}",
        }

    def close(self) -> None:
        if self._live:
            self._live.stop()


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
        # Of the work in progress, innermost last: read by the thread of `stages/progress.py`.
        self._stages: list[tuple[int, str, float]] = []
        self._bars: list[Bar] = []
        self._steps: list[str] = []

    @property
    def is_live(self) -> bool:
        return self.console.is_terminal and not self.quiet

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """Show a progress bar for a stage of `total` units, of which `done` are already finished."""
        bar = Bar(self, name, total, done)
        self._bars.append(bar)
        try:
            yield bar
        finally:
            self._bars.remove(bar)
            bar.close()

    @contextmanager
    def stage(self, number: int, name: str) -> Iterator[None]:
        """Note that a stage of a round is in progress."""
        self._stages.append((number, name, time.monotonic()))
        try:
            yield
        finally:
            self._stages.pop()

    def progress(self) -> Progress:
        """Return the state of the work, for readers in other processes. May be called from another thread."""
        bars, steps = self._bars[-1:], self._steps[-1:]
        found = bars[0].progress() if bars else Progress()
        if steps:
            found = replace(found, step=steps[0])
        for number, name, begun in self._stages[-1:]:
            found = replace(found, round=number, stage=name, seconds=time.monotonic() - begun)
        return found

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a spinner (or a line) during a step of unknown length."""
        _LOGGER.info(what)
        self._steps.append(what)
        try:
            with self._spinner(what):
                yield
        finally:
            self._steps.pop()

    @contextmanager
    def _spinner(self, what: str) -> Iterator[None]:
        if self.is_live:
            # One line, as it is: a wrapped line or a path in brackets would be shown as something else.
            shown = Text(visible(what))
            shown.truncate(self.console.width - 4, overflow="ellipsis")
            with self.console.status(shown):
                yield
        else:
            self.show(what)
            yield

    def ask(self, question: str) -> bool:
        """Ask the user a yes/no question. Return True for yes; False for no, or if nobody can be asked."""
        if not (self._asks and self.console.is_terminal and sys.stdin.isatty()):
            return False
        self.console.print(f"{question} [y/N] ", end="", highlight=False, markup=False)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def note(self, text: str) -> None:
        """Print one line for the user, and write it to the log of the run if there is one."""
        _LOGGER.info(text)
        self.show(text)

    def show(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self._line(text)

    def _line(self, text: str) -> None:
        """Print one line. Output to a file is not wrapped, to keep it searchable."""
        self.console.print(visible(text), highlight=False, markup=False, soft_wrap=not self.console.is_terminal)
