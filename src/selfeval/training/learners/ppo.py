"""PPO: clipped surrogate loss, with generalised advantages (GAE) from a critic in a separate role.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347. The critic is initialised from the evaluator (adapter and head), as in
Huang et al. 2024, https://arxiv.org/abs/2403.17031, and reads the same prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from selfeval.algorithms.masked import whiten
from selfeval.algorithms.returns import gae
from selfeval.config import CriticConfig
from selfeval.training.context import CRITIC, LearnerContext, Samples
from selfeval.training.experience import Experience, RewardScale, present, with_values
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient
from selfeval.training.policy_updates import critic_gradients

__all__ = ["PPO", "ensure_critic", "with_generalised_advantages"]


def ensure_critic(context: LearnerContext) -> None:
    """Add the role `critic` with a head unless it exists, as a copy of the evaluator if there is one."""
    backbone = context.backbone
    if CRITIC not in backbone.roles:
        evaluators = [role for role in backbone.roles if role in backbone.heads]
        backbone.add_role(CRITIC, copy_of=evaluators[0] if evaluators else None, head=True)


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
    return replace(experience, returns=torch.where(mask, raw + values, 0.0), advantages=advantages)


class PPO(ClippedPolicyGradient):
    """Proximal policy optimisation with a critic."""

    def __init__(self, context: LearnerContext) -> None:
        ensure_critic(context)
        rate = context.config.settings_as(CriticConfig).critic_learning_rate
        super().__init__(context, rates={CRITIC: rate})

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        return with_generalised_advantages(self.context, experience, scale)

    def step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """Step the policy, then the critic: in this order only one role's gradients are in memory at a time."""
        values = super().step(part, scale, iteration)
        values |= critic_gradients(self.context, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values
