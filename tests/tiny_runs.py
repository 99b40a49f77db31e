"""A run folder with a random evaluator on a tiny model, for tests of what reads its scores."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_models
from chats import CONTROL
from selfeval.backbone.role_files import save_role
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.runs.model import RunModel
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR

__all__ = ["random_roles", "run_with_evaluator"]


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


def random_roles(folder: Path, chat: str | None, config: RunConfig | None = None) -> RunModel:
    """Return the model of a run with a random policy and a random evaluator, without the files of a run.

    Args:
        folder: an empty folder.
        chat: chat template; None: a model without one.
        config: Optional. Configuration. Default: short replies.
    """
    backbone = tiny_models.backbone(vocabulary=384)
    for role in (POLICY, EVALUATOR):
        backbone.roles.add(role, seed=1, head=role == EVALUATOR)
        tiny_models.scramble(backbone, role)
    write_json(folder / EVALUATOR / "evaluator.json", {"temperature": 0.5, "mean": 0.0, "deviation": 1.0, "pairs": 0})
    tokenizer = tiny_models.words_tokenizer(CONTROL)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL[2:])})
    tokenizer.chat_template = chat
    backbone.loaded.tokenizer = tokenizer
    config = config or RunConfig.model_validate({"replies": {"max_new_tokens": 8}})
    reader: Any = SimpleNamespace(folder=folder, config=config, roles_folder=folder, round=1, check=lambda paths: None)
    return RunModel(reader, backbone, Templates.load(templates_folder("none"), tokenizer))
