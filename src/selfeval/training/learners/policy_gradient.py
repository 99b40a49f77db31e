"""What PPO, GRPO, RLOO, REINFORCE++ and ReMax share: clipped steps on minibatches, weighted with an advantage per token.

They differ in the advantage, in how the tokens of replies of different length are weighted, and in whether a critic learns
beside the policy. The KL penalty is in the reward for all of them, where its gradient is the right one (algorithms/kl.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from selfeval.algorithms.masked import Aggregation, token_weights
from selfeval.algorithms.policy_losses import ppo_clip_loss
from selfeval.training.experience import Experience, RewardScale, collect
from selfeval.training.setting import POLICY, Prompt, Samples, Setting
from selfeval.training.steps import Optimizers, learning_rate_factor, mean_of, minibatches, policy_gradients

__all__ = ["EntropyFloor", "PolicyGradient", "clipped_loss", "clipped_step", "summary"]

_ENTROPY_BONUS = 0.02
"""Weight of the entropy while it lies below the floor, in units of a whitened advantage per nat."""


def clipped_loss(setting: Setting) -> Callable[[Tensor, Experience], Tensor]:
    """PPO's clipped surrogate with the ranges of the configuration."""
    config = setting.config

    def loss(logprobs_BR: Tensor, rows: Experience) -> Tensor:
        return ppo_clip_loss(
            logprobs_BR,
            rows.logprobs,
            rows.advantages,
            clip_low=config.clip,
            clip_high=config.clip_high or config.clip,
        )

    return loss


class PolicyGradient:
    """A learner that raises the probability of tokens in proportion to their advantage.

    Args:
        setting: what the loop was given.
        advantage: per token, from rewards and groups.
        aggregation: how tokens are weighted within a minibatch.
    """

    def __init__(self, setting: Setting, advantage: Callable[[Experience], Tensor], aggregation: Aggregation) -> None:
        self.setting, self.advantage, self.aggregation = setting, advantage, aggregation
        self.roles: tuple[str, ...] = (POLICY,)
        self.optimizers = Optimizers(setting.backbone, {POLICY: setting.config.learning_rate}, setting.config)
        self.floor = EntropyFloor(setting.config.entropy_floor)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        return collect(self.setting, prompts, iteration)

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        return replace(experience, advantages=self.advantage(experience))

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        rows = [self._step(part, iteration) for part in minibatches(experience, self.setting, iteration)]
        return summary(rows, self.setting, self.optimizers, iteration, self.floor)

    def _step(self, part: Experience, iteration: int) -> dict[str, float]:
        return clipped_step(self.setting, self.optimizers, part, self.aggregation, iteration, self.floor)

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor.as_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.floor.load(state["floor"])


class EntropyFloor:
    """Adds an entropy bonus while the policy's entropy is below a share of what it was at the start.

    Args:
        share: of the entropy of the first iteration; 0 is no floor.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.first: float | None = None
        self.bonus = 0.0

    def see(self, entropy: float) -> None:
        """Takes note of an iteration's mean entropy."""
        self.first = entropy if self.first is None else self.first
        self.bonus = _ENTROPY_BONUS if entropy < self.share * self.first else 0.0

    def as_json(self) -> dict[str, float | None]:
        return {"first": self.first, "bonus": self.bonus}

    def load(self, state: Mapping[str, Any]) -> None:
        self.first, self.bonus = state["first"], float(state["bonus"])


def clipped_step(
    setting: Setting,
    optimizers: Optimizers,
    part: Experience,
    aggregation: Aggregation,
    iteration: int,
    floor: EntropyFloor,
) -> dict[str, float]:
    """One gradient step of the policy on a minibatch."""
    weights_BR = token_weights(part.mask, aggregation)
    values = policy_gradients(setting, part, weights_BR, clipped_loss(setting), entropy_bonus=floor.bonus)
    return {**values, "grad_norm": optimizers.step(POLICY, iteration)}


def summary(
    rows: Sequence[Mapping[str, float]], setting: Setting, optimizers: Optimizers, iteration: int, floor: EntropyFloor
) -> dict[str, float]:
    """Metrics of an iteration's steps: means, and the ratio gap of the very first minibatch, before anything moved."""
    means = mean_of(rows)
    floor.see(means["entropy"])
    del means["ratio_gap"]
    rate = setting.config.learning_rate * optimizers.scale * learning_rate_factor(iteration, setting.config)
    return {**means, "first_ratio": rows[0]["ratio_gap"], "learning_rate": rate}
