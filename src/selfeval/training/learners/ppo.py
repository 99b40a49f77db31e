"""PPO: clipped surrogate loss, with generalised advantages (GAE) from a critic in a separate role.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347. The critic is initialised from the evaluator (adapter and head), as in
Huang et al. 2024, https://arxiv.org/abs/2403.17031, and reads the same prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from selfeval.algorithms.masked import whiten
from selfeval.algorithms.returns import gae
from selfeval.config import CriticConfig
from selfeval.training.context import CRITIC, LearnerContext, Samples
from selfeval.training.experience import Experience, RewardScale, present, token_values, with_values
from selfeval.training.learners.learner import Peak
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient
from selfeval.training.policy_updates import critic_gradients, critic_loss

__all__ = ["PPO", "critic_scoring", "critic_update", "ensure_critic", "with_generalised_advantages"]


def ensure_critic(context: LearnerContext) -> None:
    """Add the role `critic` with a head unless it exists, as a copy of `context.evaluator` if it is set."""
    backbone = context.backbone
    if CRITIC not in backbone.roles.names:
        backbone.roles.add(CRITIC, copy_of=context.evaluator, head=True)


def with_generalised_advantages(context: LearnerContext, experience: Experience, scale: RewardScale) -> Experience:
    """Return the experience with values and returns of the critic, and generalised advantages.

    The advantages are whitened over all tokens of the iteration. The returns are computed from the raw advantages, because the
    critic predicts rewards in their own units.
    """
    settings = context.config.settings_as(CriticConfig)
    experience = with_values(context, experience, scale)
    values, mask = present(experience.values), experience.mask
    raw = gae(experience.rewards, values, mask, gamma=settings.gamma, lam=settings.gae_lambda)
    advantages = whiten(raw, mask) if settings.whiten_advantages else raw
    # GAE is return minus value, so this sum is the lambda-return.
    return replace(experience, returns=torch.where(mask, raw + values, 0.0), advantages=advantages)


def critic_scoring(context: LearnerContext, replies: int) -> Peak:
    """Declare the critic's pass over the replies of an iteration."""
    return Peak(CRITIC, lambda rows: token_values(context, rows.critic_batch), replies)


def critic_update(context: LearnerContext, replies: int) -> Peak:
    """Declare the critic's update."""
    unit = RewardScale(0.0, 1.0, 1.0)
    return Peak(CRITIC, lambda rows: critic_loss(context, rows, unit), min(context.config.minibatch, replies))


class PPO(ClippedPolicyGradient):
    """Proximal policy optimisation with a critic."""

    def __init__(self, context: LearnerContext) -> None:
        ensure_critic(context)
        rate = context.config.settings_as(CriticConfig).critic_learning_rate
        super().__init__(context, rates={CRITIC: rate})

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        return with_generalised_advantages(self.context, experience, scale)

    def scoring_peaks(self, replies: int) -> Sequence[Peak]:
        return [critic_scoring(self.context, replies)]

    def update_peaks(self, replies: int) -> Sequence[Peak]:
        return [*super().update_peaks(replies), critic_update(self.context, replies)]

    def step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """Step the policy, then the critic: in this order only one role's gradients are in memory at a time."""
        values = super().step(part, scale, iteration)
        values |= critic_gradients(self.context, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values
