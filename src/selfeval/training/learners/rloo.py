"""RLOO: the baseline of each reply is the mean reward of the other replies to the same question; no critic.

Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740. The loss is PPO's clipped surrogate, because the replies of an iteration
are used for several steps; at the first step its gradient is the plain policy gradient.
"""

from __future__ import annotations

from dataclasses import replace

from selfeval.algorithms.group_advantages import rloo_advantages
from selfeval.algorithms.masked import broadcast_to_tokens
from selfeval.training.context import Samples
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient

__all__ = ["RLOO"]


class RLOO(ClippedPolicyGradient):
    """REINFORCE with a leave-one-out baseline."""

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        whole_B = rloo_advantages(experience.rewards.sum(-1), experience.groups_B)
        return replace(experience, advantages=broadcast_to_tokens(whole_B, experience.mask))
