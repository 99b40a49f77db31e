"""Defaults that depend on the model: values for its size, and for its chat template, where neither recipe nor option sets one.

The fields' own defaults suit the embedded model of a million parameters. A LoRA adapter of a larger model needs a smaller
learning rate (Hu et al. 2021, https://arxiv.org/abs/2106.09685, use 2e-4 for GPT-2 and GPT-3; Biderman et al. 2024,
https://arxiv.org/abs/2405.09673, find the best rates for 7B between 5e-5 and 2e-4), and an instruct model writes longer texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BY_SIZE", "NO_THINKING", "SizeDefaults", "defaults_for", "size_name"]


@dataclass(frozen=True)
class SizeDefaults:
    """Values of settings for models of a range of sizes.

    Attributes:
        largest: largest number of parameters; None: no limit.
        values: values by dotted key.
        source: how far the values are measured, for the documentation.
    """

    largest: int | None
    values: Mapping[str, Any]
    source: str


# Needs of every instruct model, whatever its size: longer texts, samples that it was tuned to write, no beam search, and shards
# that take minutes and not hours.
_INSTRUCT: dict[str, Any] = {
    "backbone.rollout_batch_size": 64,
    "backbone.batch_tokens": 4096,
    "questions.temperature": 0.7,
    "questions.max_new_tokens": 128,
    "questions.shard": 64,
    "replies.max_new_tokens": "auto",
    "replies.shard": 64,
    "replies.beam_share": 0.0,
    "verdicts.max_new_tokens": 512,
    "verdicts.shard": 64,
    "policy.epochs": 1,
    "policy.minibatch": 32,
    "policy.iterations": 60,
}
# Below a billion parameters, samples at temperature 1 are often gibberish.
_SMALL: dict[str, Any] = {
    **_INSTRUCT,
    "replies.temperature": [0.6, 1.0],
    "replies.top_p": [0.9, 0.95],
    "policy.temperature": 0.8,
    "evaluation.temperature": 0.7,
    "evaluation.top_p": 0.95,
}


def _rates(evaluator: float, policy: float, tuning: float) -> dict[str, Any]:
    learners = {f"policy.{learner}.critic_learning_rate": policy for learner in ("ppo", "trpo")}
    return {"evaluator.learning_rate": evaluator, "policy.learning_rate": policy, "tuning.learning_rate": tuning, **learners}


_ASSUMED = "chosen from published LoRA recipes, not measured"

BY_SIZE: tuple[SizeDefaults, ...] = (
    SizeDefaults(20_000_000, {}, "measured on the embedded model (README)"),
    SizeDefaults(
        1_000_000_000,
        {**_SMALL, **_rates(5e-4, 2e-4, 5e-4)},
        "questions measured on SmolLM2-135M-Instruct (docs/concepts/questions.md), learning rates " + _ASSUMED,
    ),
    SizeDefaults(4_000_000_000, {**_INSTRUCT, **_rates(2e-4, 1e-4, 2e-4)}, _ASSUMED),
    SizeDefaults(16_000_000_000, {**_INSTRUCT, **_rates(1e-4, 5e-5, 2e-4)}, _ASSUMED),
    SizeDefaults(None, {**_INSTRUCT, **_rates(1e-4, 2e-5, 1e-4)}, _ASSUMED),
)
"""The table, by increasing size."""

NO_THINKING: Mapping[str, Any] = {"chat.arguments": {"enable_thinking": False}}
"""For models whose chat template reads `enable_thinking` (Qwen3, SmolLM3, GLM-4.5...): replies without a chain of thought,
which would take several times as many tokens and end at the limit."""


def defaults_for(parameters: int) -> SizeDefaults:
    """Return the row of the table for a number of parameters.

    Example:
        >>> defaults_for(135_000_000).largest
        1000000000
    """
    return next(row for row in BY_SIZE if row.largest is None or parameters <= row.largest)


def size_name(parameters: int) -> str:
    """Return a number of parameters as it is usually written.

    Example:
        >>> [size_name(n) for n in (1_035_000, 134_515_008, 7_615_616_512)]
        ['1M', '135M', '7.6B']
    """
    if parameters < 1_000_000_000:
        return f"{max(1, round(parameters / 1_000_000))}M"
    return f"{parameters / 1_000_000_000:.1f}B".replace(".0B", "B")
