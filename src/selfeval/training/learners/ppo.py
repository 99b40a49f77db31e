"""PPO: clipped steps, generalised advantages from a critic that is a role of its own.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347. The critic starts as a copy of the evaluator (its adapter and head), as
in Huang et al. 2024, https://arxiv.org/abs/2403.17031, and reads what the evaluator reads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from selfeval.algorithms.masked import whiten
from selfeval.algorithms.returns import gae
from selfeval.training.experience import Experience, RewardScale, with_values
from selfeval.training.learners.policy_gradient import PolicyGradient
from selfeval.training.setting import CRITIC, Setting
from selfeval.training.steps import critic_gradients

__all__ = ["PPO", "ensure_critic"]


def ensure_critic(setting: Setting) -> None:
    """Adds the role `critic`, with a head, unless it is there: a copy of the evaluator where there is one."""
    backbone = setting.backbone
    if CRITIC not in backbone.roles:
        evaluators = [role for role in backbone.roles if role in backbone.heads]
        backbone.add_role(CRITIC, copy_of=evaluators[0] if evaluators else None, head=True)


class PPO(PolicyGradient):
    """Proximal policy optimisation with a critic."""

    def __init__(self, setting: Setting) -> None:
        ensure_critic(setting)
        super().__init__(setting, self._advantage, "token_mean", {CRITIC: setting.config.critic_learning_rate})

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        """Generalised advantages, whitened over all tokens of the iteration; the critic's returns use the raw ones."""
        experience = with_values(self.setting, experience, scale)
        returns = torch.where(experience.mask, self._raw(experience) + experience.values, 0.0)
        return super().advantages(replace(experience, returns=returns), scale)

    def _raw(self, experience: Experience) -> Tensor:
        config = self.setting.config
        return gae(experience.rewards, experience.values, experience.mask, gamma=config.gamma, lam=config.gae_lambda)

    def _advantage(self, experience: Experience) -> Tensor:
        raw = self._raw(experience)
        return whiten(raw, experience.mask) if self.setting.config.whiten_advantages else raw

    def step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """The policy's step before the critic's gradients, so that those of one role are held at a time."""
        values = super().step(part, scale, iteration)
        values |= critic_gradients(self.setting, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values
