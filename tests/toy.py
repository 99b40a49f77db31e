"""The embedded model at toy size: its files and its settings."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from processes import selfeval

LAB = Path(__file__).resolve().parents[1] / "src" / "selfeval" / "lab"

SIZES = (
    "questions.train=48",
    "questions.test=16",
    "questions.shard=32",
    "replies.shard=32",
    "verdicts.shard=32",
    "verdicts.keep=0.5",
    "evaluator.batch=8",
    "evaluator.epochs=3",
    "evaluator.checkpoint_every=2",
    "policy.gate=off",  # sixteen test questions cannot show that the evaluator is useful
    "policy.iterations=4",
    "policy.questions_per_iteration=6",
    "policy.replies_per_question=2",
    "policy.minibatch=12",
    "policy.checkpoint_every=1",
    "evaluation.questions=16",
    "evaluation.samples=3",
    "evaluation.attacks=8",
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


def with_settings(words: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Insert settings into the words of a `run` command before its own ones, because the last --set of a key wins."""
    if words[0] != "run":
        return list(words)
    at = words.index("--set") if "--set" in words else len(words)
    return [*words[:at], *(part for setting in settings for part in ("--set", setting)), *words[at:]]


@dataclass(frozen=True)
class ToyRun:
    """A finished run at toy size.

    Attributes:
        recipe: its recipe, in a copy of the lab.
        folder: its run folder.
        out: what the command wrote to standard output.
    """

    recipe: Path
    folder: Path
    out: str


def make_toy_run(root: Path) -> ToyRun:
    """Return the run in this folder; make it first if it is not there."""
    recipe, folder, out = root / "lab" / "recipe.toml", root / "run", root / "out.txt"
    if not out.exists():
        shutil.rmtree(root, ignore_errors=True)  # left by a process that failed
        found = selfeval(*toy_arguments(copy_lab(root / "lab"), folder))
        assert found.returncode == 0, found.stderr
        out.write_text(found.stdout, "utf-8")
    return ToyRun(recipe, folder, out.read_text("utf-8"))
