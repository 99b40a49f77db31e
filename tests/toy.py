"""The embedded model at toy size, and the real command in a separate process."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
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
    "policy.iterations=7",
    "policy.questions_per_iteration=6",
    "policy.replies_per_question=2",
    "policy.minibatch=6",
    "policy.checkpoint_every=1",
    "evaluation.questions=16",
    "evaluation.samples=3",
    "lora.rank=4",
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


def selfeval(*arguments: str, preexec_fn: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end, in a process of its own.

    The process is forked by a server (`command_server.py`) unless it needs another environment or a `preexec_fn`.
    """
    if preexec_fn is None and sys.platform == "linux" and all(text.isprintable() for text in arguments):
        kept = {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}
        return _server(json.dumps(kept, sort_keys=True)).run(arguments)
    process = start(arguments, preexec_fn=preexec_fn)
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)


class _Server:
    """A process of `command_server.py`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        command = [sys.executable, str(Path(__file__).with_name("command_server.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        atexit.register(self.stop)

    def run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch()
            err.touch()
            self._send({"arguments": arguments, "folder": str(Path.cwd()), "out": str(out), "err": str(err)})
            timer = threading.Timer(TIMEOUT, os.kill, (self._receive("pid"), signal.SIGKILL))
            timer.start()
            code = self._receive("returncode")
            timer.cancel()
            return subprocess.CompletedProcess(list(arguments), code, out.read_text("utf-8"), err.read_text("utf-8"))

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def _receive(self, key: str) -> int:
        assert self.process.stdout is not None
        return int(json.loads(self.process.stdout.readline())[key])

    def stop(self) -> None:
        self.process.communicate()


@cache
def _server(environment: str) -> _Server:
    return _Server(json.loads(environment))
