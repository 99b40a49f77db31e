"""The page of a real run, from its start to a kill and its end."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from processes import TIMEOUT, Process
from selfeval.store import PROGRESS
from toy import FEW, copy_lab, toy_arguments
from view_server import FRAGMENT, client


def _shown(folder: Path, run: str) -> str:
    return client(folder).get(f"/view/run/{run}", headers=FRAGMENT).text


def _announced(html: str) -> str:
    found = re.search(r'data-announce="([^"]*)"', html)
    return found[1] if found else ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="this system does not list its locks")
def test_the_page_follows_a_run_and_a_kill(tmp_path: Path) -> None:
    arguments = toy_arguments(copy_lab(tmp_path / "lab"), tmp_path / "run", "--until", "verdicts", sizes=FEW)
    process = Process(["-m", "selfeval", *arguments])
    announced: list[str] = []
    has_counts = False
    end = time.monotonic() + TIMEOUT
    while process.returncode is None and "stage replies" not in "".join(announced):
        assert time.monotonic() < end
        html = _shown(tmp_path, "run")
        announced += [said for said in (_announced(html),) if said and said not in announced]
        has_counts |= bool(re.search(r"<span>\d+ of \d+</span>", html))
        time.sleep(0.2)
    assert any("The stage questions is in progress" in said for said in announced), announced
    assert has_counts
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / PROGRESS).is_file(), "a killed process cannot remove it"
    assert _announced(_shown(tmp_path, "run")).startswith("The run is not in progress.")
    again = Process(["-m", "selfeval", *arguments])
    again.communicate()
    assert again.returncode == 0
    assert not (tmp_path / "run" / PROGRESS).exists()
    assert _announced(_shown(tmp_path, "run")) == "The run is partial. 3 of 8 stages are finished."
