"""Policy learning on a tiny random backbone: roles, prompts, and the loop with minimal settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tiny_models
from selfeval.backbone.roles import Backbone
from selfeval.config import LEARNERS, PolicyConfig
from selfeval.prompt import Prompt
from selfeval.rollout.guide import Guide
from selfeval.training.context import CRITIC, POLICY, REFERENCE, JudgeReading, LearnerContext, QuestionPrompts, Samples, Scores
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.policy import train_policy
from selfeval.training.recorder import CheckpointRecorder
from selfeval.training.scoring import EvaluatorScorer
from selfeval.training.watchdogs import Alarm

__all__ = [
    "CONFIG",
    "DISLIKED",
    "LIKED",
    "LIMIT",
    "PROMPTS",
    "CallingRecorder",
    "changed",
    "context_of",
    "four_roles",
    "policy_config",
    "train",
]

LIKED, DISLIKED, LIMIT = 10, 11, 6
PROMPTS = [QuestionPrompts(f"q{i}", Prompt((12 + i, 20, 30 - i)), Prompt((31, 12 + i, 20, 30 - i))) for i in range(6)]


def policy_config(learner: str = "ppo", **settings: Any) -> PolicyConfig:
    """Return the configuration with these settings; those of the learner go into its section."""
    own = {name: settings.pop(name) for name in LEARNERS[learner].config.model_fields if name in settings}
    return PolicyConfig(**{"learner": learner, **settings, learner: own})


def changed(config: PolicyConfig, **settings: Any) -> PolicyConfig:
    """Return a copy with other settings; another learner keeps the settings that it shares."""
    learner = settings.get("learner", config.learner)
    values = {**config.model_dump(), **settings, "learner": learner}
    before = values.pop(config.learner)
    kept = {name: before[name] for name in LEARNERS[learner].config.model_fields if name in before}
    return policy_config(**{**kept, **values})


CONFIG = policy_config(
    iterations=8, questions_per_iteration=6, replies_per_question=8, minibatch=24, learning_rate=1e-2,
    critic_learning_rate=1e-2, warmup_iterations=0, unfinished_penalty=0.0, kl_target=6.0, checkpoint_every=3, step_kl=None,
)  # fmt: skip


@dataclass
class CallingRecorder(CheckpointRecorder):
    """Record metrics and alarms, and call the test's callback."""

    keep: Callable[..., None] = lambda *_: None
    resume: Callable[[int], None] = lambda _: None
    roll_back: Callable[..., None] = lambda *_: None
    lines: list[dict[str, float]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)

    def samples(self, iteration: int, samples: Samples, scores: Scores) -> None:
        self.keep(iteration, samples, scores)

    def resumed(self, iteration: int) -> None:
        self.resume(iteration)

    def rolled_back(self, iteration: int, alarms: Sequence[Alarm]) -> None:
        self.roll_back(iteration, alarms)

    def metrics(self, values: dict[str, float], alarms: Sequence[Alarm]) -> None:
        self.lines.append({k: v for k, v in values.items() if k != "seconds"})
        self.alarms.extend(alarms)


def four_roles(dtype: torch.dtype = torch.float32) -> Backbone:
    backbone = tiny_models.backbone("llama", eos=(1, 33, 34), dtype=dtype)
    backbone.roles.add(EVALUATOR, seed=1, head=True)
    tiny_models.scramble(backbone, EVALUATOR, size=0.05)
    backbone.roles.add(POLICY, seed=2)
    tiny_models.scramble(backbone, POLICY, seed=3, size=0.05)  # the reference must differ from the bare base
    backbone.roles.add(REFERENCE, copy_of=POLICY, trainable=False)
    backbone.roles.add(CRITIC, copy_of=EVALUATOR, head=True)
    return backbone


def context_of(
    backbone: Backbone,
    config: PolicyConfig = CONFIG,
    batch_tokens: int = 300,
    judge: Callable[[Guide | None], JudgeReading] | None = None,
) -> LearnerContext:
    scorer = EvaluatorScorer(backbone, batch_tokens)
    evaluator = EVALUATOR if EVALUATOR in backbone.roles.names else None
    return LearnerContext(
        backbone,
        config,
        scorer,
        seed=0,
        limit=LIMIT,
        batch_size=64,
        batch_tokens=batch_tokens,
        evaluator=evaluator,
        judge=judge,
    )


def train(
    backbone: Backbone,
    folder: Path,
    config: PolicyConfig = CONFIG,
    *,
    batch_tokens: int = 300,
    judge: Callable[[Guide | None], JudgeReading] | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], list[Alarm]]:
    recorder = CallingRecorder(folder, backbone, **options)
    train_policy(context_of(backbone, config, batch_tokens, judge), PROMPTS, recorder)
    return recorder.lines, recorder.alarms
