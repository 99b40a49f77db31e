"""Commands refuse folders and files that are not theirs, or are damaged, with one sentence and exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfeval.cli.app import app
from selfeval.config import load_config
from selfeval.errors import InputError
from selfeval.judging.templates import templates_folder
from selfeval.records import Pair, Question, Split
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.judge import Judge
from selfeval.runs.policy import Policy
from selfeval.runs.run import Run
from selfeval.store import RUN_SCHEMA, RunStore, write_json

DEEP = '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}\n"


def a_run(root: Path) -> Path:
    """Return a run with questions, pairs and the beginnings of an evaluator, of a model that does not exist."""
    store = RunStore(root)
    config = load_config(None, {"model": str(root / "model"), "seeds": str(root / "seeds.jsonl")})
    store.update_run(schema=RUN_SCHEMA, status="running", config=config.model_dump(mode="json"), stages={})
    (root / "seeds.jsonl").write_text('{"question": "Why?"}\n')
    store.write_shard("questions", 0, [Question("q1", "Why?", Split.TRAIN, "self")])
    store.write_shard("pairs/train", 0, [Pair("q1", "Why?", "a", "b", 0.9, (1,), (2,), Split.TRAIN)])
    write_json(root / "roles" / "evaluator" / "evaluator.json", {"temperature": 1.0, "mean": 0.0, "deviation": 1.0})
    write_json(root / "roles" / "policy" / "adapter_config.json", {"r": 8})
    shutil.copytree(templates_folder("none"), root / "templates")
    store.close()
    return root


def cut(path: Path) -> None:
    for file in (f for f in path.rglob("*") if f.is_file()):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def overwrite(text: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for name in ("questions", "pairs/train", "roles/evaluator", "roles/policy"):
            for file in (f for f in (path / name).iterdir() if f.is_file()):
                file.write_bytes(text)

    return write


def run_json(text: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "run.json").write_bytes(text)

    return write


def nothing(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


GARBAGE = {
    "an empty folder": nothing,
    "a file": file,
    "files cut in half": cut,
    "files that are not UTF-8": overwrite(b"\xff\xfe{}\n"),
    "a line nested 100,000 deep": overwrite(DEEP.encode()),
    "a number that is too large": overwrite(b'{"id": 1e999, "temperature": 1e999, "text": 1e999}\n'),
    "an empty file": overwrite(b""),
    "a list": overwrite(b"[]\n"),
    "run.json not UTF-8": run_json(b"\xff\xfe"),
    "run.json nested 100,000 deep": run_json(DEEP.encode()),
    "run.json with a number that is too large": run_json(b'{"schema": 1e999, "config": {"seed": 1e999}}'),
    "run.json is a list": run_json(b"[]"),
    "run.json is empty": run_json(b""),
}

COMMANDS = {
    "show": ["show", "RUN", "questions"],
    "show pairs": ["show", "RUN", "pairs", "--json"],
    "score": ["score", "RUN", "--question", "Why?", "--reply", "a"],
    "report": ["report", "RUN"],
    "export": ["export", "RUN", "--role", "policy", "--to", "OUT"],
    "export evaluator": ["export", "RUN", "--role", "evaluator", "--to", "OUT"],
    "run model": ["run", "--model", "RUN", "--seeds", "RUN/seeds.jsonl", "--output", "OUT"],
    "check": ["check", "RUN", "RUN/seeds.jsonl"],
    "plan": ["plan", "--model", "RUN"],
    "plan config": ["plan", "--config", "RUN/run.json"],
    "plan recipe": ["plan", "RUN/run.json"],
    "restore": ["restore", "RUN", "1"],
}


@pytest.fixture
def garbage(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    root = a_run(tmp_path / "run")
    GARBAGE[request.param](root)
    return root


@pytest.mark.parametrize("garbage", GARBAGE, indirect=True)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_garbage_with_one_sentence(command: str, garbage: Path, tmp_path: Path) -> None:
    arguments = [part.replace("RUN", str(garbage)).replace("OUT", str(tmp_path / "out")) for part in COMMANDS[command]]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert "Traceback" not in done.output
    assert done.output.count("Error") == 1


def read(folder: Path) -> None:
    run = Run.open(folder)
    run.records("questions")
    run.records("pairs")


@pytest.mark.parametrize("garbage", GARBAGE, indirect=True)
@pytest.mark.parametrize("load", [Evaluator.load, Policy.load, Judge.load, read])
def test_the_python_api_refuses_garbage_with_an_error_of_the_package(load: Callable[[Path], object], garbage: Path) -> None:
    with pytest.raises(InputError):
        load(garbage)


LINES = {
    "not UTF-8": b"\xff\xfe{}\n",
    "nested 100,000 deep": DEEP.encode(),
    "a number that is too large": b'{"question": 1e999, "replies": ["a"]}\n',
    "cut in half": b'{"question": "Why?", "rep',
    "empty": b"",
    "a list": b"[]\n",
}


@pytest.mark.parametrize("content", LINES.values(), ids=LINES)
def test_a_seeds_file_of_garbage_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "seeds.jsonl").write_bytes(content)
    done = CliRunner().invoke(
        app, ["run", "--model", "nothing", "--seeds", str(tmp_path / "seeds.jsonl"), "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.output.count("Error") == 1
    assert not (tmp_path / "out").exists()
