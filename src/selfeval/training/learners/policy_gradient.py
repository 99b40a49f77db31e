"""Base classes of the policy-gradient learners: PPO, GRPO, RLOO and others.

They differ in the advantage, in the aggregation of token losses over replies of different lengths, and in whether they train a
critic. In all of them the KL penalty is part of the reward, where its gradient is unbiased (algorithms/kl.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.masked import Aggregation, aggregation_weights
from selfeval.algorithms.policy_losses import clip_fraction, ppo_clip_loss
from selfeval.config import ClippedConfig, PolicyGradientConfig
from selfeval.training.context import POLICY, LearnerContext, QuestionPrompts, Samples
from selfeval.training.experience import Experience, RewardScale, collect, present
from selfeval.training.learners.learner import Learner, Peak
from selfeval.training.policy_updates import (
    Optimizers,
    learning_rate_factor,
    mean_of,
    minibatches,
    policy_gradients,
    policy_loss,
)

__all__ = ["ClippedPolicyGradient", "EntropyFloor", "KLAdaptiveStepSize", "PolicyGradient", "clip_advantages"]

_ENTROPY_BONUS = 0.02
"""Weight of the entropy bonus while the entropy is below the floor, in units of a whitened advantage per nat."""


class PolicyGradient(Learner):
    """Policy gradient with several minibatch steps per iteration.

    Args:
        context: shared context of policy learning.
        aggregation: weighting of the tokens within a minibatch. Default: all tokens equal.
        rates: Optional. Peak learning rates of additional roles to train.
    """

    def __init__(
        self,
        context: LearnerContext,
        aggregation: Aggregation = "token_mean",
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.context, self.aggregation = context, aggregation
        by_role = {POLICY: context.config.learning_rate, **(rates or {})}
        self.roles = tuple(by_role)
        self.optimizers = Optimizers(context.backbone, by_role, context.config)
        settings = context.config.settings_as(PolicyGradientConfig)
        self.floor = EntropyFloor(settings.entropy_floor)
        self.step_size = KLAdaptiveStepSize(settings.step_kl)

    @abstractmethod
    def clip_fraction(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        """Return the share of tokens whose loss is clipped."""

    @abstractmethod
    def loss(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        """Compute the loss of each token from its log-prob under the current policy, `[B, R]`."""

    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        return collect(self.context, prompts, iteration)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        config = self.context.config
        # `Optimizers.step` reads the rate, so the reduced peak applies to all minibatches of this iteration.
        peak = self.optimizers.rates[POLICY] = config.learning_rate * self.step_size.factor
        rows = [self.step(part, scale, iteration) for part in minibatches(experience, self.context, iteration)]
        means = mean_of(rows)
        self.floor.update(means["entropy"])
        self.step_size.update(means["approximate_kl"])
        # Only the gap before the first step is a check: later steps move the ratio on purpose.
        del means["ratio_gap"]
        rate = peak * self.optimizers.scale * learning_rate_factor(iteration, config)
        return {**means, "first_ratio": rows[0]["ratio_gap"], "learning_rate": rate}

    def step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """Take one step of the policy on a minibatch."""
        # Dr. GRPO divides by the maximum length of a reply, which is the limit of sampling.
        length = self.context.limit if self.aggregation == "constant_length" else None
        weights_BR = aggregation_weights(part.mask, self.aggregation, norm_length=length)
        values = policy_gradients(
            self.context, part, weights_BR, self.loss, entropy_bonus=self.floor.bonus, clip_fraction=self.clip_fraction
        )
        return {**values, "grad_norm": self.optimizers.step(POLICY, iteration)}

    def microbatch_loss(self, rows: Experience) -> Tensor:
        """Compute the loss of a micro-batch under the policy, which must be acting, with every token weighted equally."""
        bonus = 0.0 if self.floor.share is None else _ENTROPY_BONUS
        return policy_loss(self.context, rows, torch.ones_like(rows.logprobs), self.loss, entropy_bonus=bonus).objective

    def update_peaks(self, replies: int) -> Sequence[Peak]:
        return [Peak(POLICY, self.microbatch_loss, min(self.context.config.minibatch, replies))]

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor.as_json(), "step_size": self.step_size.factor}

    def load(self, state: Mapping[str, Any]) -> None:
        self.floor.load(state["floor"])
        self.step_size.factor = float(state["step_size"])


class ClippedPolicyGradient(PolicyGradient):
    """A policy gradient with PPO's clipped surrogate loss."""

    def __init__(
        self,
        context: LearnerContext,
        aggregation: Aggregation = "token_mean",
        rates: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(context, aggregation, rates)
        self.clipped = context.config.settings_as(ClippedConfig)

    @property
    def clip(self) -> tuple[float, float]:
        """The clip range of the ratio, [1 - lower, 1 + upper], as (lower, upper)."""
        return self.clipped.clip_range

    def advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        return clip_advantages(self.raw_advantages(samples, experience, scale), self.clipped.advantage_clip)

    @abstractmethod
    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        """Return the experience with advantages before clipping."""

    def clip_fraction(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        return clip_fraction(
            logprobs_BR, rows.logprobs, present(rows.advantages), rows.mask, clip_low=self.clip[0], clip_high=self.clip[1]
        )

    def loss(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        low, high = self.clip
        dual = self.clipped.dual_clip
        return ppo_clip_loss(logprobs_BR, rows.logprobs, present(rows.advantages), clip_low=low, clip_high=high, dual_clip=dual)


def clip_advantages(experience: Experience, limit: float | None) -> Experience:
    """Clip the advantages to [-limit, limit]; None leaves them unchanged."""
    return experience if limit is None else replace(experience, advantages=present(experience.advantages).clamp(-limit, limit))


class KLAdaptiveStepSize:
    """Reduce the step size after an iteration whose KL exceeded a limit, and recover it gradually.

    For small steps the KL is proportional to the square of their length, so the factor is multiplied by sqrt(limit / KL), at
    least 1/2 per iteration; it recovers by 10 % per iteration and never exceeds 1.

    Args:
        limit: limit on the mean approximate KL of an iteration's steps, in nats per token; None for no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.factor = 1.0

    def update(self, kl: float) -> None:
        """Update the factor with the approximate KL of an iteration."""
        if self.limit is not None and kl > self.limit:
            # At least 1/2, because the factor recovers by only 10 % per iteration and one KL may be an outlier.
            self.factor *= max(0.5, (self.limit / kl) ** 0.5)
        else:
            self.factor = min(1.0, 1.1 * self.factor)


class EntropyFloor:
    """Add an entropy bonus while the policy's entropy is below a share of its initial value.

    Args:
        share: the floor, relative to the entropy of the first iteration; None for no floor.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.first: float | None = None
        self.bonus = 0.0

    def update(self, entropy: float) -> None:
        """Update the bonus with the mean entropy of an iteration."""
        self.first = entropy if self.first is None else self.first
        self.bonus = _ENTROPY_BONUS if self.share is not None and entropy < self.share * self.first else 0.0

    def as_json(self) -> dict[str, float | None]:
        return {"first": self.first, "bonus": self.bonus}

    def load(self, state: Mapping[str, Any]) -> None:
        self.first, self.bonus = state["first"], float(state["bonus"])
