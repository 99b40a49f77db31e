from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from selfeval.stages import progress as module
from selfeval.stages.progress import progress_file
from selfeval.stages.terminal import Terminal
from selfeval.store import PROGRESS, Progress, read_progress
from served import wait_for


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.01)


def _read(folder: Path) -> Progress:
    found: Any = wait_for(lambda: read_progress(folder))
    return found[0]


def test_the_file_follows_stages_bars_and_steps_and_is_removed(tmp_path: Path) -> None:
    terminal = Terminal(quiet=True)
    with progress_file(tmp_path, terminal):
        assert _read(tmp_path).stage == ""
        with terminal.stage(2, "policy"):
            with terminal.waiting("loading little"):
                wait_for(lambda: (_read(tmp_path).stage, _read(tmp_path).step) == ("policy", "loading little"))
            with terminal.bar("policy", 10, done=2) as bar:
                bar.within(1.5)
                bar.say("reward 0.3")
                wait_for(lambda: _read(tmp_path).figures == "reward 0.3")
                found = _read(tmp_path)
                assert (found.round, found.done, found.total) == (2, 3.5, 10.0)
                assert found.host
        wait_for(lambda: _read(tmp_path).stage == "")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_removed_after_an_error_too(tmp_path: Path) -> None:
    def fail() -> None:
        with progress_file(tmp_path, Terminal(quiet=True)):
            _read(tmp_path)
            raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_sign_of_life_is_written_without_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SIGN_OF_LIFE", 0.02)
    with progress_file(tmp_path, Terminal(quiet=True)):
        _read(tmp_path)
        first = (tmp_path / PROGRESS).stat().st_mtime_ns
        wait_for(lambda: (tmp_path / PROGRESS).stat().st_mtime_ns > first)


def test_without_news_the_file_is_written_once(tmp_path: Path) -> None:
    with progress_file(tmp_path, Terminal(quiet=True)):
        _read(tmp_path)
        first = (tmp_path / PROGRESS).stat().st_mtime_ns
        time.sleep(0.1)
        assert (tmp_path / PROGRESS).stat().st_mtime_ns == first


def test_a_folder_that_was_replaced_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with progress_file(folder, Terminal(quiet=True)):
        _read(folder)
        folder.rename(tmp_path / "old")
        folder.mkdir()
        (folder / PROGRESS).write_text("another process's")
        time.sleep(0.1)
        assert (folder / PROGRESS).read_text() == "another process's"
    assert (folder / PROGRESS).read_text() == "another process's"
    shutil.rmtree(tmp_path / "old")
