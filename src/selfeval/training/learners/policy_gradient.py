"""What the learners share that raise the probability of tokens in proportion to an advantage: PPO, GRPO, RLOO, and others.

They differ in the advantage, in how the tokens of replies of different length are weighted, and in whether a critic learns
beside the policy. The KL penalty is in the reward for all of them, where its gradient is the right one (algorithms/kl.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from selfeval.algorithms.masked import Aggregation, aggregation_weights
from selfeval.algorithms.policy_losses import ppo_clip_loss
from selfeval.training.experience import Experience, RewardScale, collect
from selfeval.training.setting import POLICY, Prompt, Samples, Setting
from selfeval.training.steps import Optimizers, learning_rate_factor, mean_of, minibatches, policy_gradients

__all__ = ["EntropyFloor", "Pace", "PolicyGradient"]

_ENTROPY_BONUS = 0.02
"""Weight of the entropy while it lies below the floor, in units of a whitened advantage per nat."""


class PolicyGradient:
    """A learner that takes clipped steps on minibatches, the tokens weighted with an advantage.

    Args:
        setting: what the loop was given.
        advantage: per token, from rewards and groups.
        aggregation: how tokens are weighted within a minibatch.
        rates: peak learning rates of further roles that it trains.
    """

    def __init__(
        self,
        setting: Setting,
        advantage: Callable[[Experience], Tensor],
        aggregation: Aggregation,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.setting, self.advantage, self.aggregation = setting, advantage, aggregation
        by_role = {POLICY: setting.config.learning_rate, **(rates or {})}
        self.roles: tuple[str, ...] = tuple(by_role)
        self.optimizers = Optimizers(setting.backbone, by_role, setting.config)
        self.floor = EntropyFloor(setting.config.entropy_floor)
        self.pace = Pace(setting.config.step_kl)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        return collect(self.setting, prompts, iteration)

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        advantages, limit = self.advantage(experience), self.setting.config.advantage_clip
        return replace(experience, advantages=advantages.clamp(-limit, limit) if limit else advantages)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        config = self.setting.config
        peak = self.optimizers.rates[POLICY] = config.learning_rate * self.pace.factor
        rows = [self.step(part, scale, iteration) for part in minibatches(experience, self.setting, iteration)]
        means = mean_of(rows)
        self.floor.see(means["entropy"])
        self.pace.see(means["approximate_kl"])
        del means["ratio_gap"]
        rate = peak * self.optimizers.scale * learning_rate_factor(iteration, config)
        return {**means, "first_ratio": rows[0]["ratio_gap"], "learning_rate": rate}

    def step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """One step of the policy on a minibatch."""
        weights_BR = aggregation_weights(part.mask, self.aggregation)
        values = policy_gradients(self.setting, part, weights_BR, self.loss, entropy_bonus=self.floor.bonus)
        return {**values, "grad_norm": self.optimizers.step(POLICY, iteration)}

    def loss(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        """PPO's clipped surrogate with the ranges of the configuration, per token."""
        config = self.setting.config
        high, dual = config.clip_high or config.clip, config.dual_clip or None
        return ppo_clip_loss(logprobs_BR, rows.logprobs, rows.advantages, clip_low=config.clip, clip_high=high, dual_clip=dual)

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor.as_json(), "pace": self.pace.factor}

    def load(self, state: Mapping[str, Any]) -> None:
        self.floor.load(state["floor"])
        self.pace.factor = float(state["pace"])


class Pace:
    """Shortens the policy's steps after an iteration that moved it too far, and lengthens them again after the others.

    The KL of small steps goes with the square of their length, so that the factor goes with the root of limit / KL; to half
    at most in one iteration, and back by a tenth. As in PPO with an adaptive rate, but never above the configured one.

    Args:
        limit: on the mean approximate KL over an iteration's steps, in nats per token; 0 is none.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.factor = 1.0

    def see(self, kl: float) -> None:
        """Takes note of how far an iteration's steps moved the policy."""
        if self.limit and kl > self.limit:
            self.factor *= max(0.5, (self.limit / kl) ** 0.5)
        else:
            self.factor = min(1.0, 1.1 * self.factor)


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
