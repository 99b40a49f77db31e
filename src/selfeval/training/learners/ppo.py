"""PPO: clipped steps, generalised advantages from a critic that is a role of its own.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347. The critic starts as a copy of the evaluator (its adapter and head), as
in Huang et al. 2024, https://arxiv.org/abs/2403.17031, and reads what the evaluator reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from selfeval.algorithms.masked import whiten
from selfeval.algorithms.returns import gae
from selfeval.training.experience import Experience, RewardScale, collect, with_values
from selfeval.training.learners.policy_gradient import EntropyFloor, clipped_step, summary
from selfeval.training.setting import CRITIC, POLICY, Prompt, Samples, Setting
from selfeval.training.steps import Optimizers, critic_gradients, minibatches

__all__ = ["PPO", "ensure_critic"]


def ensure_critic(setting: Setting) -> None:
    """Adds the role `critic`, with a head, unless it is there: a copy of the evaluator where there is one."""
    backbone = setting.backbone
    if CRITIC not in backbone.roles:
        evaluators = [role for role in backbone.roles if role in backbone.heads]
        backbone.add_role(CRITIC, copy_of=evaluators[0] if evaluators else None, head=True)


class PPO:
    """Proximal policy optimisation with a critic."""

    def __init__(self, setting: Setting) -> None:
        ensure_critic(setting)
        config = setting.config
        self.setting = setting
        self.roles: tuple[str, ...] = (POLICY, CRITIC)
        rates = {POLICY: config.learning_rate, CRITIC: config.critic_learning_rate}
        self.optimizers = Optimizers(setting.backbone, rates, config)
        self.floor = EntropyFloor(config.entropy_floor)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        return collect(self.setting, prompts, iteration)

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        """Generalised advantages, whitened over all tokens of the iteration; the critic's returns use the raw ones."""
        config, mask = self.setting.config, experience.mask
        experience = with_values(self.setting, experience, scale)
        raw = gae(experience.rewards, experience.values, mask, gamma=config.gamma, lam=config.gae_lambda)
        returns = torch.where(mask, raw + experience.values, 0.0)
        advantages = whiten(raw, mask) if config.whiten_advantages else raw
        if config.advantage_clip:
            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        return replace(experience, advantages=advantages, returns=returns)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        rows = [self._step(part, scale, iteration) for part in minibatches(experience, self.setting, iteration)]
        return summary(rows, self.setting, self.optimizers, iteration, self.floor)

    def _step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        """The policy's step before the critic's gradients, so that those of one role are held at a time."""
        values = clipped_step(self.setting, self.optimizers, part, "token_mean", iteration, self.floor)
        values |= critic_gradients(self.setting, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor.as_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.floor.load(state["floor"])
