"""Runs at a URL with the real commands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from processes import TIMEOUT, selfeval, start
from remote_homes import FAST, S3Server, machine, new_url, s3_server
from selfeval import Run
from selfeval.store.remote.index import read_index
from selfeval.store.remote.mirror import fetched, opened
from selfeval.store.remote.objects import open_objects
from selfeval.store.remote.places import run_path
from toy import FEW, ToyRun, toy_arguments


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as found:
        yield found


@pytest.fixture
def toy_url(server: S3Server, toy_run: ToyRun, tmp_path: Path) -> str:
    """The URL of a finished run, written on another machine."""
    url = new_url("s3", tmp_path)
    with machine(tmp_path / "there"), opened(url, timing=FAST) as folder:
        shutil.copytree(toy_run.folder, folder, dirs_exist_ok=True)
    return url


def test_show_export_and_the_python_api_take_a_url(toy_url: str, toy_run: ToyRun, tmp_path: Path) -> None:
    with machine(tmp_path / "here"):
        shown = selfeval("show", toy_url, "pairs")
        assert shown.stdout == selfeval("show", str(toy_run.folder), "pairs").stdout
        assert shown.stdout.count("\n") > 10
        run, local = Run.open(toy_url), Run.open(toy_run.folder)
        assert run.folder == run_path(toy_url)
        assert run.status == local.status == "finished"
        assert run.records("pairs", split="train") == local.records("pairs", split="train")
        for source, name in ((toy_url, "remote"), (str(toy_run.folder), "local")):
            done = selfeval("export", source, "--role", "policy", "--to", str(tmp_path / name))
            assert done.returncode == 0, done.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("remote", "local")]
    assert weights[0] == weights[1]


def test_a_url_without_a_run_is_one_sentence(server: S3Server, tmp_path: Path) -> None:
    url = new_url("s3", tmp_path)
    with machine(tmp_path / "here"):
        found = selfeval("show", url, "pairs")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"Error: there is no run at {url}; pass the URL of a run written by `selfeval run --output URL`\n"


def _arguments(recipe: Path, output: str) -> list[str]:
    return [output if word == "OUTPUT" else word for word in toy_arguments(recipe, Path("OUTPUT"), sizes=FEW)]


def _kill_after(stage: str, arguments: list[str], url: str) -> None:
    """Start the command, and kill it as soon as the results of a stage are at the URL."""
    process = start(arguments)
    until = time.monotonic() + TIMEOUT
    while True:
        found = read_index(open_objects(url), url, 60.0)
        if found is not None and f"{stage}/manifest.json" in found[0].files:
            break
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.communicate()


def _evidence(folder: Path) -> dict[str, Any]:
    """report.json without the times and the memory of a process."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    del report["time"], report["memory"]["peak_bytes"]
    return report


def _lasting(folder: Path) -> dict[str, bytes]:
    """Shards and trained weights."""
    paths = [*folder.rglob("shard-*.jsonl"), *folder.glob("roles/*/*.safetensors")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_a_killed_run_is_finished_on_other_machines_with_the_same_shards_weights_and_report(
    server: S3Server, toy_run: ToyRun, tmp_path: Path
) -> None:
    """Two machines are lost, each after other stages; the third one finishes the run."""
    url = new_url("s3", tmp_path)
    plain = selfeval(*_arguments(toy_run.recipe, str(tmp_path / "plain")))
    assert plain.returncode == 0, plain.stderr
    for stage in ("questions", "verdicts"):
        with machine(tmp_path / stage):
            _kill_after(stage, _arguments(toy_run.recipe, url), url)
        shutil.rmtree(tmp_path / stage)
    with machine(tmp_path / "last"):
        last = selfeval("run", "--output", url)
    assert last.returncode == 0, last.stderr
    with machine(tmp_path / "reader"):
        folder = fetched(url)
    assert _evidence(folder) == _evidence(tmp_path / "plain")
    assert _lasting(folder) == _lasting(tmp_path / "plain")
    stages = json.loads((folder / "run.json").read_text("utf-8"))["stages"]
    assert {row["state"] for row in stages.values()} == {"finished"}
