from __future__ import annotations

import io
import logging
import os
import re
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from selfeval.errors import StorageError
from selfeval.stages import terminal as terminal_module
from selfeval.stages.run_log import LOG, run_log
from selfeval.stages.terminal import Terminal


def test_notes_progress_and_warnings_are_written_with_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_module, "_PLAIN_SECONDS", -1.0)
    # Also where nothing is shown, and where a live bar is.
    for terminal in (Terminal(quiet=True), Terminal(console=Console(file=io.StringIO(), force_terminal=True, width=80))):
        with run_log(tmp_path):
            terminal.note("kept 3\x1b[31m")
            with terminal.bar("replies", 10) as bar:
                bar.advance(4)
            with terminal.waiting("loading m"):
                pass
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("old", stacklevel=1)
            logging.getLogger("transformers").warning("slow tokenizer")
    text = (tmp_path / LOG).read_text()
    assert "\x1b" not in text
    said = ["INFO selfeval: selfeval ", r"kept 3\x1b[31m", "DEBUG selfeval.stages.terminal: replies: 4/10,", "loading m",
            "UserWarning: old", "WARNING transformers: slow tokenizer"]  # fmt: skip
    for part in said:
        assert text.count(part) == 2, f"{part} once per block:\n{text}"
    stamped = [line for line in text.splitlines() if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ ", line)]
    assert len(stamped) >= 2 * len(said)


def test_an_error_is_written_with_its_traceback_and_nothing_after_the_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="odd"), run_log(tmp_path):
        raise ValueError("odd")
    Terminal(quiet=True).note("later")
    text = (tmp_path / LOG).read_text()
    assert "ERROR selfeval: ended by ValueError\nTraceback (most recent call last):" in text
    assert "later" not in text


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOG).symlink_to(tmp_path / "other")
    with pytest.raises(StorageError, match=r"cannot write .*run\.log"), run_log(tmp_path):
        pass
    assert not os.path.lexists(tmp_path / "other")
