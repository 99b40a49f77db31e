"""A run folder with a random evaluator on a tiny model, for tests of what reads its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
from selfeval.backbone.role_files import save_role
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.evaluator import EVALUATOR

__all__ = ["run_with_evaluator"]


def run_with_evaluator(folder: Path, config: RunConfig, **options: Any) -> Context:
    """Return the context of a run in `folder`, whose evaluator has random weights and is saved, but not trained."""
    made = Context(config, RunStore(folder / "run"), Terminal(quiet=True), **options)
    backbone = tiny_models.backbone("llama", 384)
    made.__dict__.update(backbone=backbone, templates=Templates.load(templates_folder("none"), backbone.loaded.tokenizer))
    backbone.roles.add(EVALUATOR, head=True)
    tiny_models.scramble(backbone, EVALUATOR, size=0.1)
    save_role(backbone, EVALUATOR, made.role_folder(EVALUATOR))
    write_json(made.role_folder(EVALUATOR) / "evaluator.json", {"temperature": 1.0, "mean": 0.0, "deviation": 1.0})
    return made
