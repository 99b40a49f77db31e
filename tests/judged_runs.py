"""Runs of a tiny random model with replies to judge, in which the verdicts stage is real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
from selfeval.config import RunConfig
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, Reply, Split
from selfeval.stages.context import Context
from selfeval.stages.terminal import Terminal
from selfeval.store import RUN_SCHEMA, RunStore

__all__ = ["CUT", "PAIRS", "WORKS", "run_of", "shards"]

PAIRS = 20
CUT: dict[str, Any] = {"max_new_tokens": 4}
"""A random model gives no verdict in four tokens."""
WORKS: dict[str, Any] = {"reasoning": False, "label_mass": 0.0, "keep": 0.5, "tie": 1.0}


def run_of(folder: Path, settings: dict[str, Any], *, count: int = PAIRS, seed: int = 0, **options: Any) -> Context:
    """A run with replies to judge, in a folder that may have earlier work."""
    made = Context(RunConfig(verdicts={"shard": 8, **settings}), RunStore(folder), Terminal(quiet=True), **options)
    backbone = tiny_models.backbone("llama", 384, seed=seed, max_position_embeddings=1024)
    templates = Templates.load(templates_folder("none"), backbone.loaded.tokenizer, kinds=kinds_of_run(made.config.verdicts))
    made.__dict__.update(backbone=backbone, templates=templates)
    made.store.update_run(schema=RUN_SCHEMA)
    if not made.store.shards("questions"):
        made.store.write_shard("questions", 0, [Question(f"q{i}", f"What is {i}?", Split.TRAIN, "self") for i in range(count)])
        texts = [(f"q{i}", n, f"{i} {'one' if n else 'two'}") for i in range(count) for n in (0, 1)]
        replies = [Reply(f"{q}-r{n}", q, text, (7, 1), "sample", 1.0, 1.0, -1.0, True) for q, n, text in texts]
        made.store.write_shard("replies", 0, replies)
    return made


def shards(run: Context) -> list[bytes]:
    return [path.read_bytes() for path in run.store.shards("verdicts")]
