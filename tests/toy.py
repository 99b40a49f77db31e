"""The embedded model at toy size, and the real command in a separate process."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

TIMEOUT = 300
"""Seconds that a command may take."""

LAB = Path(__file__).resolve().parents[1] / "src" / "selfeval" / "lab"

SIZES = (
    "questions.train=48",
    "questions.test=16",
    "questions.shard=32",
    "replies.shard=24",
    "verdicts.shard=24",
    "verdicts.keep=0.5",
    "evaluator.batch=8",
    "evaluator.epochs=5",
    "evaluator.checkpoint_every=2",
    "policy.gate=off",  # sixteen test questions cannot show that the evaluator is useful
    "policy.iterations=7",
    "policy.questions_per_iteration=6",
    "policy.replies_per_question=2",
    "policy.minibatch=6",
    "policy.checkpoint_every=1",
    "evaluation.questions=16",
    "evaluation.samples=3",
    "backbone.lora.rank=4",
)
"""Settings that run the whole loop in seconds."""

FEW = (
    *SIZES,
    "questions.train=24",
    "questions.test=12",
    "evaluation.questions=12",
    "evaluation.samples=2",
    "evaluator.epochs=2",
    "policy.iterations=2",
)
"""Settings for tests that need a run and not its size."""


def copy_lab(folder: Path) -> Path:
    """Copy the embedded recipe with its model and seeds for a test to change."""
    folder.mkdir(parents=True)
    for name in ("recipe.toml", "seeds.jsonl"):
        shutil.copy(LAB / name, folder / name)
    shutil.copytree(LAB / "word_problems", folder / "word_problems")
    return folder / "recipe.toml"


def toy_arguments(recipe: Path, output: Path, *more: str, sizes: Sequence[str] = SIZES) -> list[str]:
    """Arguments of `selfeval run` at toy size; `more` overrides the sizes."""
    settings = [part for size in sizes for part in ("--set", size)]
    return ["run", str(recipe), "--output", str(output), *settings, *more]


def environment() -> dict[str, str]:
    """One thread (the same sums everywhere), no network, and the source tree under test."""
    paths = [str(LAB.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200"}


def start(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start the real command as a child process with its output piped."""
    command = [sys.executable, "-m", "selfeval", *arguments]
    pipes: Mapping[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes, **options)


PRELOADED = ["peft", "selfeval.cli.app", "selfeval.cli.scoring", "selfeval.stages.pipeline", "selfeval.stages.running"]
"""Imported once by the fork server. Importing torch, transformers and PEFT takes about five seconds of CPU time."""


def selfeval(*arguments: str, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end, in a separate process.

    The process is forked from one that has imported the libraries, unless it needs an environment other than the one that they
    were imported with, or a `preexec_fn`.
    """
    if preexec_fn is None and sys.platform == "linux" and _environment() == _fork_server()[1]:
        return _run_forked(arguments)
    process = start(arguments, preexec_fn=preexec_fn)
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


def _environment() -> dict[str, str]:
    """Return the environment of the command, without the variable in which pytest stores the name of the current test."""
    return {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}


@cache
def _fork_server() -> tuple[ForkServerContext, dict[str, str]]:
    """Start the fork server in the environment of the command; return its context and that environment."""
    context, before, expected = multiprocessing.get_context("forkserver"), dict(os.environ), _environment()
    context.set_forkserver_preload(PRELOADED)
    os.environ.update(expected)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context, expected


def _run_forked(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _fork_server()[0].Process(target=_run_here, args=(list(arguments), Path.cwd(), out, err))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), TIMEOUT)
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def _run_here(arguments: list[str], folder: Path, out: Path, err: Path) -> None:
    """Run the command as `python -m selfeval` does, in this process, with its output in files."""
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["selfeval", *arguments]
    runpy.run_module("selfeval", run_name="__main__", alter_sys=True)
