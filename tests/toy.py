"""The embedded model at toy size, and the real command in a separate process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Run the real command to completion."""
    process = start(arguments, preexec_fn=preexec_fn)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)
