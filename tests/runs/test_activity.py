from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from processes import SRC
from selfeval.runs.activity import STOPPED, activity
from selfeval.store import PROGRESS, Progress, RunStore, is_locked, read_progress, write_progress

HOLD = """
import sys, time
from pathlib import Path
from selfeval.store import RunStore
store = RunStore(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""

linux = pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="this system does not list its locks")


def _aged(folder: Path, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(folder / PROGRESS, (at, at))


def test_progress_is_read_as_it_was_written(tmp_path: Path) -> None:
    progress = Progress("here", 2, "policy", 12.5, "policy", 3.5, 10.0, 0.25, 26.0, "reward 0.3")
    write_progress(tmp_path, progress)
    found = read_progress(tmp_path)
    assert found is not None
    assert found[0] == progress
    assert found[1] < 60
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"done": "3"}',
        '{"done": true}',
        '{"done": -1}',
        '{"total": 1e300}',
        '{"stage": 3}',
        '{"x": 1' + "0" * 20_000,
    ],
)
def test_unreadable_progress_is_none(text: str, tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / PROGRESS).write_text(text)
    assert read_progress(tmp_path) is None


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run" / f".{PROGRESS}.part").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=PROGRESS):
        write_progress(tmp_path / "run", Progress())
    assert (tmp_path / "victim").read_text() == "mine"


@linux
def test_the_lock_of_another_process_is_seen_and_not_taken(tmp_path: Path) -> None:
    assert is_locked(tmp_path) is None, "there is no lock file"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path) is True
        assert activity(tmp_path, "running").status == "running"
    finally:
        holder.kill()
        holder.communicate()
    assert is_locked(tmp_path) is False
    assert activity(tmp_path, "running").status == STOPPED
    RunStore(tmp_path).close()  # which fails if it is locked


@linux
def test_a_killed_process_leaves_progress_that_does_not_count(tmp_path: Path) -> None:
    RunStore(tmp_path).close()
    write_progress(tmp_path, Progress(platform.node(), stage="policy"))
    assert activity(tmp_path, "running").status == STOPPED
    assert activity(tmp_path, "finished").status == "finished"
    store = RunStore(tmp_path)
    found = activity(tmp_path, "running")
    store.close()
    assert found.is_running
    assert found.progress is not None
    assert found.progress.stage == "policy"


@pytest.mark.parametrize(("age", "status"), [(5.0, "running"), (300.0, STOPPED)])
def test_elsewhere_the_age_of_the_progress_decides(age: float, status: str, tmp_path: Path) -> None:
    """As for a folder on a shared disk, whose lock another machine holds."""
    RunStore(tmp_path).close()
    write_progress(tmp_path, Progress("another-machine", stage="policy"))
    _aged(tmp_path, age)
    assert activity(tmp_path, "running").status == status


def test_without_a_list_of_locks_nothing_is_claimed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("selfeval.store.run_lock._LOCKS", tmp_path / "none")
    RunStore(tmp_path).close()
    assert is_locked(tmp_path) is None
    assert activity(tmp_path, "running").status == "running"
    assert activity(tmp_path, "interrupted").status == "interrupted"
