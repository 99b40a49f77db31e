from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from processes import SRC
from selfeval.stages import terminal as module
from selfeval.stages.terminal import Terminal


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def _console(*, live: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=live, width=120), text


def test_plain_lines_come_at_most_every_ten_seconds(clock: _Clock) -> None:
    console, text = _console(live=False)
    with Terminal(console=console).bar("replies", 100, done=20) as bar:
        clock.now += 9
        bar.advance(18)
        assert text.getvalue() == ""
        clock.now += 3
        bar.say("loss 0.5")
        bar.advance(6)
        bar.advance(6)
    # 24 of the 80 that were left, in 12 s: 2 a second, and 56 more need 28 s; work of an earlier attempt does not count.
    assert text.getvalue() == "replies: 44/100, 2.0/s, about 30 s left loss 0.5\n"


def test_a_plain_line_before_anything_is_done_has_no_time_left(clock: _Clock) -> None:
    console, text = _console(live=False)
    with Terminal(console=console).bar("questions", 64) as bar:
        clock.now += 12
        bar.advance(0)
    assert text.getvalue() == "questions: 0/64, 0.0/s\n"


def test_quiet_shows_nothing(clock: _Clock) -> None:
    for live in (False, True):
        console, text = _console(live=live)
        terminal = Terminal(quiet=True, console=console)
        with terminal.waiting("loading"), terminal.bar("replies", 10) as bar:
            clock.now += 60
            bar.advance(5)
            bar.say("loss")
            terminal.note("a note")
        assert text.getvalue() == ""


def test_notes_are_shown_as_they_are(clock: _Clock) -> None:
    console, text = _console(live=False)
    terminal = Terminal(console=console)
    terminal.note("kept [bold]3[/bold] of 5 [/x]")
    with terminal.waiting("loading m"):
        pass
    assert text.getvalue() == "kept [bold]3[/bold] of 5 [/x]\nloading m\n"


def test_a_live_bar_shows_count_and_figures_and_stops_on_an_error() -> None:
    console, text = _console(live=True)

    def work() -> None:
        with Terminal(console=console).bar("policy", 4, done=1) as bar:
            bar.say("kl 0.25")
            bar.advance(2)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert "policy" in text.getvalue()
    assert "kl 0.25" in text.getvalue()
    assert "3/4" in text.getvalue()
    assert text.getvalue().endswith("\x1b[2K"), "the bar is wiped when the stage ends"
    Terminal(console=console).note("after")
    assert "after" in text.getvalue()


@pytest.mark.parametrize("width", [12, 24, 40, 60, 80, 120])
def test_a_live_bar_is_one_line_at_any_width(clock: _Clock, width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, color_system="standard")
    with Terminal(console=console).bar("evaluation", 5678, done=1200) as bar:
        clock.now += 30
        bar.say("reward -0.14 kl -0.01 length 18")
        bar.advance(34)
        (line,) = (console.render_lines(bar, console.options.update(height=None), pad=False),)
    assert len(line) == 1
    shown = "".join(segment.text for segment in line[0])
    assert len(shown) < width, "the last column is free"
    # 34 units in 30 s, so 4,444 more need 65 min
    wanted = {"evaluation": 12, "1234/5678": 24, "about 1 h 10 min": 40, "about 1 h 10 min left": 60, "22%": 60}
    wanted |= {"reward -0.14 kl -0.01": 80, "length 18": 120, "1.1/s": 120, "0:00:30": 120}
    assert {name: name in shown for name in wanted} == {name: width >= least for name, least in wanted.items()}
    assert sum(shown.count(drawn) for drawn in "━╸╺") == {60: 12, 80: 8, 120: 26}.get(width, 0)


def test_units_in_progress_move_the_bar_and_not_the_count_of_finished_ones(clock: _Clock) -> None:
    console, text = _console(live=False)
    with Terminal(console=console).bar("replies", 512) as bar:
        clock.now += 11
        bar.within(51.2)
        assert bar.done == 0
        clock.now += 11
        bar.within(102.4)
        bar.advance(512)
    # 51.2 units in 11 s, so 460.8 more need 99 s; then 409.6 more need 88 s
    assert text.getvalue().splitlines() == [
        "replies: 51/512, 4.7/s, about 2 min left",
        "replies: 102/512, 4.7/s, about 2 min left",
    ]


def test_a_step_of_unknown_length_is_one_line_with_its_text_as_it_is() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=40, color_system=None)
    with Terminal(console=console).waiting("loading models/[bold]x[/bold]/a/very/long/path/to/a/model"):
        pass
    assert "loading models/[bold]x[/bold]/a/ver" in text.getvalue()
    assert "to/a/model" not in text.getvalue()


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().note("a note")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "a note\n")


# -- a real terminal ----------------------------------------------------------------------------------------------------

IN_TMUX = """
import sys, time
from selfeval.stages.terminal import Terminal

terminal = Terminal()
terminal.note("begin")
with terminal.bar("evaluation", 5678, done=1200) as bar:
    for step in range(1, 13):
        time.sleep(0.4)
        bar.within(17.5 * step)
        bar.say(f"reward -0.{step} kl -0.01 length 18")
        if step == 6:
            terminal.note("a note in the middle")
terminal.note("end")
time.sleep(60)
"""


def _tmux(socket: str, *arguments: str) -> str:
    found = subprocess.run(["tmux", "-L", socket, "-f", "/dev/null", *arguments], capture_output=True, text=True, check=True)
    return found.stdout


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize("width", [80, 40])
def test_in_tmux_a_bar_is_one_line_and_leaves_nothing_behind(tmp_path: Path, width: int) -> None:
    script, socket = tmp_path / "script.py", f"selfeval-{os.getpid()}-{width}"
    script.write_text(IN_TMUX)
    command = shlex.join(["env", "-u", "COLUMNS", f"PYTHONPATH={SRC}", sys.executable, str(script)])
    _tmux(socket, "new-session", "-d", "-x", str(width), "-y", "12", command)
    try:
        screens: list[list[str]] = []
        deadline = time.monotonic() + 120
        while not screens or "end" not in screens[-1]:
            assert time.monotonic() < deadline, screens
            time.sleep(0.1)
            shown = _tmux(socket, "capture-pane", "-p").split("\n")
            screens.append([line.rstrip() for line in shown if line.strip()])
    finally:
        _tmux(socket, "kill-server")
    assert screens[-1] == ["begin", "a note in the middle", "end"], "the bar leaves nothing behind"
    bars = [[line for line in screen if line not in ("begin", "a note in the middle", "end")] for screen in screens]
    assert max(map(len, bars)) == 1, "never more than one line"
    assert all(line.startswith("evaluation") and len(line) < width for (line,) in filter(None, bars))
    last = [line for (line,) in filter(None, bars)][-1]
    assert 1300 < int(last.split("/5678 ")[0].split()[-1]) <= 1410  # the last redraw may be older than the last unit
    assert " about " in last
