"""Logs of Inspect: read back by Inspect itself, in a separate process, because its import takes seconds."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from processes import python, python_anew, selfeval
from selfeval.errors import ExportError, RunFolderError
from selfeval.runs import inspect_log
from selfeval.runs.inspect_log import export_log
from selfeval.runs.reader import RunReader
from toy import ToyRun

needs_inspect = pytest.mark.skipif(find_spec("inspect_ai") is None, reason="inspect_ai is not installed")

_READ = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log
logs = [read_eval_log(info) for info in list_eval_logs(sys.argv[1])]
print(json.dumps({log.eval.dataset.name: json.loads(log.model_dump_json()) for log in logs}))
"""


@pytest.fixture(scope="module")
def logs(toy_run: ToyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("logs") / "toy"
    done = selfeval("export-log", str(toy_run.folder), "--to", str(folder))
    assert done.returncode == 0, done.stderr
    counts = {name: len(RunReader(toy_run.folder).records(kind)) for name, kind in inspect_log.LOGS.items()}
    assert sorted(done.stdout.splitlines()) == sorted(f"{folder / name}.eval: {n} samples" for name, n in counts.items())
    read = python_anew(_READ, str(folder))
    assert read.returncode == 0, read.stderr
    found: dict[str, Any] = json.loads(read.stdout.splitlines()[-1])
    return found


@needs_inspect
@pytest.mark.slow
def test_inspect_reads_the_replies_of_the_policy(logs: dict[str, Any], toy_run: ToyRun) -> None:
    reader = RunReader(toy_run.folder)
    rows = {row.question_id: row for row in reader.records("compared")}
    questions = {row.id: row.text for row in reader.records("questions")}
    samples = {sample["id"]: sample for sample in logs["compared"]["samples"]}
    assert samples.keys() == rows.keys()
    for name, row in rows.items():
        sample = samples[name]
        assert [message["content"] for message in sample["messages"]] == [questions[name], row.after]
        assert sample["scores"]["win"]["answer"] == row.outcome
        assert sample["scores"]["gold"]["value"] == _value(row.gold_after)
    win = next(score for score in logs["compared"]["results"]["scores"] if score["name"] == "win")
    figure = reader.report()["policy"]["win_rate"]
    metric = win["metrics"]["win_rate"]
    assert (metric["value"], metric["metadata"]["n"]) == (figure["value"], figure["n"])


@needs_inspect
@pytest.mark.slow
def test_inspect_reads_the_pairs_of_the_evaluator(logs: dict[str, Any], toy_run: ToyRun) -> None:
    rows = RunReader(toy_run.folder).records("scored")
    replies = {row.id: row.text for row in RunReader(toy_run.folder).records("replies")}
    for row, sample in zip(rows, logs["scored"]["samples"], strict=True):
        assert sample["choices"] == [replies[row.first], replies[row.second]]
        assert sample["scores"]["margin"]["value"] == row.margin
        if {row.gold_first, row.gold_second} == {True, False}:
            assert sample["target"] == ("A" if row.gold_first else "B")
            assert sample["scores"]["gold"]["value"] == float((row.margin > 0) == row.gold_first)
        else:
            assert sample["target"] == ""
            assert _is_unscored(sample["scores"]["gold"])


@needs_inspect
@pytest.mark.slow
def test_a_verdict_that_could_not_be_read_is_unscored(logs: dict[str, Any], toy_run: ToyRun) -> None:
    rows = RunReader(toy_run.folder).records("verdicts")
    found = [sample["scores"]["probability_of_a"] for sample in logs["verdicts"]["samples"]]
    assert Counter(map(_is_unscored, found)) == Counter(row.probability is None for row in rows)
    assert [score["value"] for score in found if not _is_unscored(score)] == [
        pytest.approx(row.probability) for row in rows if row.probability is not None
    ]


@needs_inspect
@pytest.mark.slow
def test_a_run_in_progress_has_the_log_of_its_verdicts(toy_run: ToyRun, tmp_path: Path) -> None:
    part = shutil.copytree(toy_run.folder, tmp_path / "run")
    for stage in ("evaluation", "report"):
        shutil.rmtree(part / stage)
    assert list(export_log(RunReader(part), tmp_path / "logs")) == ["judge"]
    shutil.rmtree(part / "verdicts")
    with pytest.raises(RunFolderError, match="has no verdicts yet"):
        export_log(RunReader(part), tmp_path / "more")
    assert not (tmp_path / "more").exists()


@needs_inspect
@pytest.mark.slow
def test_nothing_is_overwritten(toy_run: ToyRun, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not empty"):
        export_log(RunReader(toy_run.folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_inspect_the_extra_is_named(toy_run: ToyRun, tmp_path: Path) -> None:
    code = "import sys; sys.modules['inspect_ai.log'] = None; from selfeval.cli import main; main()"
    done = python(code, "export-log", str(toy_run.folder), "--to", str(tmp_path / "logs"))
    assert done.returncode == 2
    assert "pip install 'self-evaluator[inspect]'" in done.stderr
    assert not (tmp_path / "logs").exists()


def _value(right: bool | None) -> Any:
    return pytest.approx(float("nan"), nan_ok=True) if right is None else float(right)


def _is_unscored(score: dict[str, Any]) -> bool:
    value = score["value"]
    return value is None or value != value
