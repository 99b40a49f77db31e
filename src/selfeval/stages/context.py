"""What every stage is given: configuration, run folder, backbone, templates, and a way to show progress."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from selfeval.backbone.roles import Backbone
from selfeval.config import RunConfig
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, Reply, Seed, Split, Working
from selfeval.stages.seeds import read_seeds
from selfeval.stages.terminal import Terminal
from selfeval.stages.trackers import Trackers
from selfeval.store import RunStore

__all__ = ["Context", "as_begun"]


def as_begun(config: RunConfig, run: Mapping[str, Any]) -> RunConfig:
    """The configuration with the precision that was picked for this run and model, whatever memory is free now.

    Args:
        config: what is asked for.
        run: the content of run.json.
    """
    device = run.get("device") or {}
    if config.precision == "auto" == device.get("asked") and config.model == device.get("model"):
        return config.model_copy(update={"precision": device["precision"]})
    return config


@dataclass
class Context:
    """One run in this process; the backbone is loaded when a stage first needs it."""

    config: RunConfig
    store: RunStore
    terminal: Terminal

    @cached_property
    def backbone(self) -> Backbone:
        with self.terminal.waiting(f"loading {self.config.model}"):
            backbone = Backbone.load(as_begun(self.config, self.store.run))
        backbone.budget.tell = self.terminal.note
        for note in backbone.loaded.notes:
            self.terminal.note(note)
        loaded, plan = backbone.loaded, backbone.loaded.placement
        device: dict[str, Any] = {
            "device": str(loaded.device),
            "model": self.config.model,
            "asked": self.config.precision,
            "precision": loaded.precision,
            "notes": loaded.notes,
        }
        self.store.update_run(device=device if plan is None else {**device, "placement": plan.as_json()})
        return backbone

    def take_memory_events(self) -> list[dict[str, Any]]:
        """What happened to the limits of the backbone's passes since the last call; nothing while it is not loaded."""
        backbone: Backbone | None = self.__dict__.get("backbone")
        return [event.as_json() for event in backbone.budget.take_events()] if backbone else []

    @cached_property
    def templates(self) -> Templates:
        return Templates.load(templates_folder(self.config.model, self.config.templates), self.backbone.loaded.tokenizer)

    @cached_property
    def trackers(self) -> Trackers:
        return Trackers(self.config, self.store.root / "trackers", self.terminal)

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        """One line of a stage's metrics: to its file, and to the trackers that are asked for."""
        self.store.add_metrics(stage, values)
        self.trackers.log(stage, values)

    @cached_property
    def seeds(self) -> list[Seed]:
        return read_seeds(self.config.seeds)

    def questions(self, split: Split) -> list[Question]:
        return [q for q in self.store.read("questions", Question) if q.split == split]

    @cached_property
    def _workings(self) -> dict[str, str]:
        return {w.question_id: w.text for w in self.store.read("workings", Working)}

    def grade_prompt(self, question_id: str, question: str) -> tuple[int, ...]:
        """What evaluator and critic read before a reply; with the model's own working where the template shows it."""
        working = self._workings[question_id] if self.templates.grades_with_working else ""
        return self.templates.prompt("grade", question=question, working=working)

    def replies(self) -> dict[str, Reply]:
        return {r.id: r for r in self.store.read("replies", Reply)}

    def random(self, *names: object) -> random.Random:
        """A generator that depends on the run's seed and these names alone."""
        return random.Random("/".join(str(part) for part in (self.config.seed, *names)))

    def seed(self, *names: object) -> int:
        """A seed that depends on the run's seed and these names alone."""
        return self.random(*names).getrandbits(48)

    def role_folder(self, role: str) -> Path:
        return self.store.root / "roles" / role

    def checkpoint_folder(self, stage: str) -> Path:
        return self.store.root / "checkpoints" / stage
