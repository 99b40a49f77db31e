from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import rich.console
from sample_report import sample_report
from typer.testing import CliRunner

from selfeval.cli.app import app
from selfeval.cli.listing import print_runs
from selfeval.config import RunConfig
from selfeval.errors import InputError
from selfeval.runs.listing import ListedRun, list_runs
from selfeval.store import RunStore, write_sealed

STAGES = {"questions": {"state": "finished"}, "replies": {"state": "interrupted"}}


def _run(folder: Path, model: str = "/models/little", **values: Any) -> Path:
    folder.mkdir(parents=True)
    config = RunConfig(model=model).model_dump(mode="json")
    write_sealed(folder / "run.json", {"status": "interrupted", "name": "mine", "config": config, "stages": STAGES, **values})
    return folder


def _reported(folder: Path) -> Path:
    """A run with a report, whose hash a stage has recorded."""
    store = RunStore(_run(folder, status="finished"))
    store.write_json(folder / "report.json", sample_report())
    store.begin("report", "key")
    store.finish("report", "key", {}, [folder / "report.json"])
    store.close()
    return folder


def test_runs_are_found_at_any_depth_with_their_state(tmp_path: Path) -> None:
    folder = _run(tmp_path / "group" / "a")
    os.utime(folder / "run.json", (1_700_000_000, 1_700_000_000))
    _run(folder / "rounds" / "02", round=2, stages={"questions": {"state": "finished"}})
    (tmp_path / "notes").mkdir()
    _run(tmp_path / ".hidden")
    (tmp_path / "link").symlink_to(tmp_path / "group")
    changed = datetime.fromtimestamp(1_700_000_000).astimezone()
    expected = ListedRun(folder, "", "mine", "interrupted", "round 2, questions", "/models/little", changed, {})
    assert list_runs(tmp_path) == list_runs(folder) == [expected]


def test_a_run_in_progress_is_read_without_its_lock(tmp_path: Path) -> None:
    store = RunStore(_run(tmp_path / "a", status="running"))
    assert [run.status for run in list_runs(tmp_path)] == ["running"]
    store.close()


def test_the_main_figures_are_those_of_the_report(tmp_path: Path) -> None:
    folder = _reported(tmp_path / "a")
    (run,) = list_runs(tmp_path)
    report = json.loads((folder / "report.json").read_text())
    found = run.as_json()["figures"]
    assert found["accuracy_gold"] == report["evaluator"]["accuracy_gold"]
    assert {name: found[name] for name in ("win_rate", "gold_before", "gold_after")} == {
        name: report["policy"][name] for name in ("win_rate", "gold_before", "gold_after")
    }


def test_damaged_runs_have_a_reason_and_hide_no_other(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    (_reported(tmp_path / "c") / "report.json").write_text("{}")
    (_run(tmp_path / "d") / "out").symlink_to("/etc/passwd")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").mkdir()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "run.json").symlink_to("nowhere")
    a, *others = list_runs(tmp_path)
    assert not a.problem
    reasons = ["run.json is damaged", "report.json is damaged", "is a link to /etc/passwd", "run.json", "is not a run"]
    assert len(others) == len(reasons)
    for run, reason in zip(others, reasons, strict=True):
        assert reason in run.problem
    assert others[1].status == "finished", "what can be read is listed"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is not a folder; pass one that contains run folders"):
        list_runs(tmp_path / "none")


def _printed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int | None) -> str:
    made = rich.console.Console
    if columns:
        monkeypatch.setattr(rich.console, "Console", lambda: made(force_terminal=True, width=columns, color_system=None))
    print_runs(list_runs(folder), folder, as_json=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_on_a_terminal_no_line_is_wider_than_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    _reported(tmp_path / "a")
    shown = _printed(tmp_path, monkeypatch, capsys, columns)
    assert max(map(len, shown.splitlines())) <= columns
    for part in ("finished", "little", "[", "win rate"):
        assert part in " ".join(shown.split())


def test_elsewhere_a_run_is_one_line_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path / "a\x1b[31m", model="org/model")
    (line,) = _printed(tmp_path, monkeypatch, capsys, None).splitlines()
    cells = line.split("\t")
    assert cells[:4] == [f"{tmp_path}/a\\x1b[31m", "interrupted", "replies", "org/model"]
    assert len(cells) == 6


def test_the_command_prints_a_json_object_per_run(tmp_path: Path) -> None:
    _run(tmp_path / "a")
    _reported(tmp_path / "b")
    found = CliRunner().invoke(app, ["list", str(tmp_path), "--json"])
    assert [json.loads(line) for line in found.output.splitlines()] == [run.as_json() for run in list_runs(tmp_path)]
    none = CliRunner().invoke(app, ["list", str(tmp_path / "none")])
    assert none.exit_code == 2
    assert "is not a folder" in none.output
