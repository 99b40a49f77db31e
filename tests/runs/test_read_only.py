"""Commands that read a run need neither its lock nor the permission to write to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sample_report import sample_report
from typer.testing import CliRunner

from selfeval.cli.app import app
from selfeval.config import RunConfig
from selfeval.store import RUN_SCHEMA, RunStore, write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a report and replaced results, whose lock another process holds and whose page cannot be written."""
    store = RunStore(tmp_path / "run")
    store.update_run(schema=RUN_SCHEMA, status="running", config=RunConfig().model_dump(mode="json"))
    store.begin("policy", "key")
    store.write_shard("policy", 0, [])
    store.set_aside("policy")
    write_json(store.root / "report.json", sample_report())
    (store.root / "index.html").mkdir()
    (store.root / "metrics").mkdir()
    store.close()
    return store.root


def test_report_as_json_needs_no_page(run: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(run), "--json"])
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout) == sample_report()
    assert f"Note: cannot write {run / 'index.html'}: " in found.stderr
    refused = CliRunner().invoke(app, ["report", str(run)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"Error: cannot write {run / 'index.html'}: ")


def test_replaced_results_are_listed_without_the_lock(run: Path) -> None:
    store = RunStore(run)
    try:
        found = CliRunner().invoke(app, ["restore", str(run)])
        assert found.exit_code == 0, found.stderr
        assert found.stdout.startswith("1: policy (")
        assert "another process is using" in CliRunner().invoke(app, ["restore", str(run), "1"]).stderr
    finally:
        store.close()
