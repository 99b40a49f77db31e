"""A model that is given by its hub id is known by the files of its cached snapshot, and not by its name."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from processes import python, selfeval
from toy import SIZES, copy_lab

COMMITS = ("a" * 40, "b" * 40)


def publish(cache: Path, commit: str, source: Path) -> None:
    """Puts a model folder into the hub's cache as the snapshot of `main`: links to blobs, as the hub's client writes them."""
    repository = cache / "models--org--toy"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file():
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (repository / "refs" / "main").write_text(commit)


def change(folder: Path, what: str) -> None:
    if what == "one matrix":
        weights = load_file(folder / "model.safetensors")
        weights[sorted(name for name in weights if weights[name].dim() == 2)[0]].neg_()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "generation_config.json").write_text('{"max_length": 77}')


def outcome(arguments: list[str]) -> dict[str, Any]:
    """Run the command in this process; return its exit code and what it wrote."""
    from selfeval.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["selfeval", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    run = Path(arguments[arguments.index("--output") + 1]) / "run.json"
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "commit": json.loads(run.read_text())["commit"]}


def run_before_and_after(what: str, model: str, command: str) -> None:
    """Run the commands of the test below and print their outcomes. In one process, because the cache is read on import."""
    arguments, cache = json.loads(command), Path(os.environ["HF_HOME"]) / "hub"
    first = [outcome(arguments), outcome(arguments)]
    change(Path(model), what)
    publish(cache, COMMITS[1], Path(model))
    old = [*arguments[:2], str(cache / "models--org--toy" / "snapshots" / COMMITS[0]), *arguments[3:]]
    print("OUTCOMES", json.dumps([*first, outcome(arguments), outcome(old)]))


IN_A_PROCESS = (
    "import sys; sys.path[:0] = sys.argv[1].split(':'); import test_hub; test_hub.run_before_and_after(*sys.argv[2:])"
)


@pytest.mark.parametrize("what", ["one matrix", pytest.param("another file", marks=pytest.mark.slow)])
def test_a_hub_id_that_points_at_other_files_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    lab = copy_lab(tmp_path / "lab").parent
    model, cache, output = lab / "word_problems", tmp_path / "hf" / "hub", tmp_path / "run"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    publish(cache, COMMITS[0], model)
    sizes = (*SIZES, f"templates={model / 'templates'}", "questions.train=12", "questions.test=4")
    settings = [part for size in sizes for part in ("--set", size)]
    seeds = ("--seeds", str(lab / "seeds.jsonl"))
    command = ["run", "--model", "org/toy", *seeds, "--output", str(output), "--until", "questions", *settings]

    here = Path(__file__).parent
    done = python(IN_A_PROCESS, f"{here}:{here.parent}", what, str(model), json.dumps(command))
    assert done.returncode == 0, done.stderr
    first, again, refused, same = json.loads(done.stdout.partition("OUTCOMES ")[2])
    assert first["code"] == 0, first["err"]
    assert first["commit"] == COMMITS[0]
    assert "is already finished" in again["out"]

    assert refused["code"] == 2, refused["out"]
    assert "the model's files changed" in refused["err"]
    assert f"commit of org/toy: {COMMITS[0]}, now {COMMITS[1]}" in refused["err"]
    assert not (output / "replaced").exists()

    assert same["code"] == 0, same["err"]
    assert "is already finished" in same["out"]


def test_a_hub_id_that_is_neither_cached_nor_reachable_is_refused(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.txt"
    seeds.write_text("What is 1 + 1?\n")
    model = "self-evaluator/not-published"
    found = selfeval("run", "--model", model, "--seeds", str(seeds), "--output", str(tmp_path / "run"))
    assert found.returncode == 2
    assert found.stderr.startswith(f"Error: cannot load model {model}: ")
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
