"""The lock of a run folder, and the record of its holder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from processes import TIMEOUT, environment
from selfeval.errors import RunFolderError
from selfeval.store import RunStore
from selfeval.store.holder import Holder, this_process
from selfeval.store.progress import PROGRESS
from selfeval.store.run_lock import LOCK, RunLock, read_holder

ELSEWHERE = Holder("elsewhere", "elsewhere 1 2", 7, 1.0)


def _left_by(holder: Holder, folder: Path, seconds: float) -> Path:
    """Return a run folder whose holder wrote its progress some seconds ago and holds no lock that this system knows."""
    RunStore(folder).close()
    (folder / LOCK).write_text(json.dumps(holder.as_json()), encoding="utf-8")
    (folder / PROGRESS).write_text("{}", encoding="utf-8")
    then = time.time() - seconds
    os.utime(folder / PROGRESS, (then, then))
    return folder


def test_the_lock_names_its_holder_while_it_is_held(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    assert read_holder(tmp_path) == this_process()
    assert json.loads((tmp_path / LOCK).read_text("utf-8"))["pid"] == os.getpid()
    lock.release()
    assert read_holder(tmp_path) is None


def test_a_second_process_is_refused_with_the_holder_and_changes_nothing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    code = f"from pathlib import Path; from selfeval.store.run_lock import RunLock; RunLock(Path({str(tmp_path)!r}))"
    for _ in range(2):
        refused = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        assert f"another process is using {tmp_path} (process {os.getpid()} on " in refused.stderr
        assert read_holder(tmp_path) == this_process()
    lock.release()
    RunLock(tmp_path).release()


def test_a_killed_process_leaves_its_record_and_does_not_refuse_the_next_one(tmp_path: Path) -> None:
    lines = ("import os, sys", "from pathlib import Path", "from selfeval.store.run_lock import RunLock")
    code = "; ".join([*lines, f"lock = RunLock(Path({str(tmp_path)!r}))", "os.kill(os.getpid(), 9)"])
    killed = subprocess.run([sys.executable, "-c", code], env=environment(), check=False, timeout=TIMEOUT)
    assert killed.returncode == -9
    left = read_holder(tmp_path)
    assert left is not None
    assert left.is_here
    assert left.is_gone
    (tmp_path / PROGRESS).write_text("{}", encoding="utf-8")  # fresh: its holder is known to have ended all the same
    lock = RunLock(tmp_path)
    assert read_holder(tmp_path) == this_process()
    lock.release()


def test_a_process_of_another_machine_that_wrote_a_short_time_ago_is_not_replaced(tmp_path: Path) -> None:
    folder = _left_by(ELSEWHERE, tmp_path / "run", 20.0)
    for _ in range(2):  # a refusal keeps the record, so the next attempt is refused too
        with pytest.raises(RunFolderError, match=r"was left by process 7 on elsewhere.* 2\d seconds ago.*in [34]\d seconds"):
            RunStore(folder)
        assert read_holder(folder) == ELSEWHERE


@pytest.mark.parametrize(
    ("holder", "seconds"),
    [(ELSEWHERE, 90.0), (replace(this_process(), pid=2**30), 1.0)],
    ids=["another machine, silent", "this machine, ended"],
)
def test_a_run_whose_holder_is_gone_is_opened(holder: Holder, seconds: float, tmp_path: Path) -> None:
    store = RunStore(_left_by(holder, tmp_path / "run", seconds))
    assert read_holder(tmp_path / "run") == this_process()
    store.close()
