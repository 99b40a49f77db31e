"""Policy learning on a tiny random backbone: roles, prompts, and the loop with the least that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tiny_models
from selfeval.backbone.roles import Backbone
from selfeval.config import PolicyConfig
from selfeval.rollout.guide import Guide
from selfeval.training.checkpoint import Checkpoints
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.policy import train_policy
from selfeval.training.scoring import EvaluatorScorer
from selfeval.training.setting import CRITIC, POLICY, REFERENCE, JudgeReading, Prompt, Setting
from selfeval.training.watchdogs import Alarm

__all__ = ["CONFIG", "DISLIKED", "LIKED", "LIMIT", "PROMPTS", "four_roles", "setting_of", "train"]

LIKED, DISLIKED, LIMIT = 10, 11, 6
PROMPTS = [Prompt(f"q{i}", (12 + i, 20, 30 - i), (31, 12 + i, 20, 30 - i)) for i in range(6)]
CONFIG = PolicyConfig(
    iterations=8, questions_per_iteration=6, replies_per_question=8, minibatch=24, learning_rate=1e-2,
    critic_learning_rate=1e-2, warmup_iterations=0, unfinished_penalty=0.0, kl_target=6.0, checkpoint_every=3, step_kl=0.0,
)  # fmt: skip


def four_roles(dtype: torch.dtype = torch.float32) -> Backbone:
    backbone = tiny_models.backbone("llama", eos=(1, 33, 34), dtype=dtype)
    backbone.add_role(EVALUATOR, seed=1, head=True)
    tiny_models.scramble(backbone, EVALUATOR, size=0.05)
    backbone.add_role(POLICY, seed=2)
    tiny_models.scramble(backbone, POLICY, seed=3, size=0.05)  # so that the reference is not the bare base
    backbone.add_role(REFERENCE, copy_of=POLICY, trainable=False)
    backbone.add_role(CRITIC, copy_of=EVALUATOR, head=True)
    return backbone


def setting_of(
    backbone: Backbone,
    config: PolicyConfig = CONFIG,
    batch_tokens: int = 300,
    judge: Callable[[Guide | None], JudgeReading] | None = None,
) -> Setting:
    scorer = EvaluatorScorer(backbone, batch_tokens)
    return Setting(backbone, config, scorer, seed=0, limit=LIMIT, rows=64, batch_tokens=batch_tokens, judge=judge)


def train(
    backbone: Backbone,
    folder: Path,
    config: PolicyConfig = CONFIG,
    *,
    batch_tokens: int = 300,
    judge: Callable[[Guide | None], JudgeReading] | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], list[Alarm]]:
    lines: list[dict[str, float]] = []
    alarms: list[Alarm] = []

    def checkpoints(roles: Sequence[str], optimizers: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(folder, backbone, roles, optimizers)

    def log(values: dict[str, float], seen: Sequence[Alarm]) -> None:
        lines.append({k: v for k, v in values.items() if k != "seconds"})
        alarms.extend(seen)

    defaults: dict[str, Any] = {
        "keep": lambda *_: None, "log": log, "resumed": lambda step: None, "rolled_back": lambda step, alarms: None,
    }  # fmt: skip
    train_policy(setting_of(backbone, config, batch_tokens, judge), PROMPTS, checkpoints, **{**defaults, **options})
    return lines, alarms
