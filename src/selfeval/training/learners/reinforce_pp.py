"""REINFORCE++: token-level returns whitened over the whole iteration, without a critic and without groups.

Hu et al. 2025, https://arxiv.org/abs/2501.03262.
"""

from __future__ import annotations

from dataclasses import replace

from selfeval.algorithms.group_advantages import reinforce_pp_advantages
from selfeval.config import ReinforcePPConfig
from selfeval.training.context import Samples
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient

__all__ = ["ReinforcePP"]


class ReinforcePP(ClippedPolicyGradient):
    """REINFORCE with PPO's clipping and a global baseline."""

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        gamma = self.context.config.settings_as(ReinforcePPConfig).gamma
        found = reinforce_pp_advantages(experience.rewards, experience.mask, gamma=gamma)
        return replace(experience, advantages=found)
