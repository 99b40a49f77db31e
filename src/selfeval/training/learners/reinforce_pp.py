"""REINFORCE++: returns per token, whitened over the whole iteration, which is the only baseline; no critic, no groups.

Hu et al. 2025, https://arxiv.org/abs/2501.03262.
"""

from __future__ import annotations

from torch import Tensor

from selfeval.algorithms.group_advantages import reinforce_pp_advantages
from selfeval.training.experience import Experience
from selfeval.training.learners.policy_gradient import PolicyGradient
from selfeval.training.setting import Setting

__all__ = ["reinforce_pp"]


def reinforce_pp(setting: Setting) -> PolicyGradient:
    """REINFORCE with PPO's clip and a baseline that all replies share."""

    def advantage(experience: Experience) -> Tensor:
        return reinforce_pp_advantages(experience.rewards, experience.mask, gamma=setting.config.gamma)

    return PolicyGradient(setting, advantage, "token_mean")
