"""RLOO: each reply's baseline is the mean reward of the other replies to its question; no critic.

Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740. The steps are PPO's clipped ones, so that an iteration's replies can be
used more than once; at the first of them the gradient is the plain one.
"""

from __future__ import annotations

from torch import Tensor

from selfeval.algorithms.group_advantages import rloo_advantages
from selfeval.algorithms.masked import broadcast_to_tokens
from selfeval.training.experience import Experience
from selfeval.training.learners.policy_gradient import PolicyGradient
from selfeval.training.setting import Setting

__all__ = ["rloo"]


def rloo(setting: Setting) -> PolicyGradient:
    """REINFORCE with a leave-one-out baseline."""

    def advantage(experience: Experience) -> Tensor:
        whole_B = rloo_advantages(experience.rewards.sum(-1), experience.groups_B)
        return broadcast_to_tokens(whole_B, experience.mask)

    return PolicyGradient(setting, advantage, "token_mean")
