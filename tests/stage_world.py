"""A run folder in a world where stages only write files, for tests of what is run, skipped and redone."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfeval.config import load_config
from selfeval.judging.templates import templates_folder
from selfeval.records import Seed
from selfeval.stages import pipeline
from selfeval.stages.context import Context, in_process
from selfeval.stages.rounds import run_rounds
from selfeval.stages.shards import Batch, Executor, ModelHandle, ShardOutput
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json

STAGES = ("questions", "replies", "verdicts", "pairs", "evaluator", "policy", "evaluation", "report")
SHARDS = 2
FILES = {
    "evaluator": ("roles/evaluator-0/adapter_model.safetensors", "roles/evaluator-0/evaluator.json"),
    "policy": ("roles/policy/adapter_model.safetensors",),
    "evaluation": ("evaluation/figures.json",),
    "report": ("report.json",),
}
"""Files that stages write besides shards; stages not listed write shards only."""
_WRITTEN = {**FILES, "steps": ("roles/steps/adapter_model.safetensors",)}
"""The same with the stage that not every run has."""


def _no_work(model: ModelHandle, batch: Batch[Any]) -> ShardOutput:
    return ShardOutput([])


class World:
    """A run folder and stages that only write files; `ran` says which of them were run.

    Attributes:
        text: of a stage's shards and files.
        fails: stages that raise in the middle of their work; those of later rounds are named `2 policy`.
        recovers: the failing stages that raise only once.
        executor_of: optional; makes the executor of every stage that writes shards.
        said: messages to the user.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self.text: dict[str, str] = dict.fromkeys((*STAGES, "steps"), "as ever")
        self.fails: dict[str, BaseException] = {}
        self.recovers: set[str] = set()
        self.redone: list[str] = []
        self.executor_of: Callable[[Context], Executor] = in_process
        self.said = io.StringIO()
        if not folder.exists():
            model = folder / "model"
            model.mkdir(parents=True)
            (model / "config.json").write_text('{"model_type": "none"}')
            shutil.copytree(templates_folder("no such model"), model / "templates")
            (folder / "seeds.txt").write_text("What is 1 + 1?\nWhat is 2 + 2?\n")
        stages = tuple(dataclasses.replace(stage, run=self._stage(stage.name)) for stage in pipeline.STAGES)
        monkeypatch.setattr(pipeline, "STAGES", stages)

    def _stage(self, name: str) -> Any:
        def run(context: Context) -> dict[str, Any]:
            label = name if context.round == 1 else f"{context.round} {name}"
            self.ran.append(label)
            if name not in _WRITTEN:
                assert list(context.executor.map(_no_work, [])) == []
            for shard in range(0 if name in _WRITTEN else SHARDS):
                if not context.store.has_shard(name, shard):
                    self.redone.append(f"{name} {shard}")
                    context.store.write_shard(name, shard, [Seed(f"{name} {shard} {self.text[name]}")])
                if label in self.fails:
                    raise self.fails[label]
            if label in self.fails:
                raise self.fails.pop(label) if label in self.recovers else self.fails[label]
            for path in _WRITTEN.get(name, ()):
                write_json(context.store.root / path, f"{path} {self.text[name]}")
            return {"shards": SHARDS}

        return run

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def run(self, *assignments: str, until: str | None = None, round: int = 1, restart: bool = True) -> list[str]:
        """One `selfeval run --restart` with these settings; the stages that it ran, those of later rounds as `2 questions`."""
        self.ran.clear()
        self.redone.clear()
        given = {"model": str(self.folder / "model"), "seeds": str(self.folder / "seeds.txt")}
        store = RunStore(self.run_folder)
        terminal = Terminal(console=Console(file=self.said, width=200))
        try:
            context = Context(
                load_config(None, given, assignments), store, terminal, restart=restart, executor_of=self.executor_of
            )
            run_rounds(context, (round, until) if until else None)
        finally:
            store.close()
        return list(self.ran)

    def keys(self) -> dict[str, str]:
        return {stage: json.loads((self.run_folder / stage / "key.json").read_text())["key"] for stage in STAGES}

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_folder / "run.json").read_text())
        return found

    def states(self) -> dict[str, str]:
        return {name: row["state"] for name, row in self.info()["stages"].items()}

    def files(self) -> dict[str, bytes]:
        """Return everything that stages wrote, by path, except archived files."""
        paths = [p for p in self.run_folder.rglob("*") if p.is_file() and "replaced" not in p.parts]
        return {str(p.relative_to(self.run_folder)): p.read_bytes() for p in paths if p.name not in ("run.json", ".lock")}
