"""The embedded model at toy size: its files and its settings."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

LAB = Path(__file__).resolve().parents[1] / "src" / "selfeval" / "lab"

SIZES = (
    "questions.train=48",
    "questions.test=16",
    "questions.shard=32",
    "replies.shard=24",
    "verdicts.shard=24",
    "verdicts.keep=0.5",
    "evaluator.batch=8",
    "evaluator.epochs=3",
    "evaluator.checkpoint_every=2",
    "policy.gate=off",  # sixteen test questions cannot show that the evaluator is useful
    "policy.iterations=4",
    "policy.questions_per_iteration=6",
    "policy.replies_per_question=2",
    "policy.minibatch=6",
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
