"""GRPO: the replies to one question are each other's baseline, in units of their standard deviation; no critic.

Shao et al. 2024, https://arxiv.org/abs/2402.03300. Every reply has the same weight, whatever its length (eq. 3).
Unlike in the paper the KL penalty is part of the reward, where its gradient is unbiased, instead of a k3 term of the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from selfeval.algorithms.group_advantages import grpo_advantages
from selfeval.algorithms.masked import broadcast_to_tokens
from selfeval.training.context import LearnerContext, Samples
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient

__all__ = ["GRPO"]


class GRPO(ClippedPolicyGradient):
    """Group relative policy optimisation."""

    def __init__(self, context: LearnerContext) -> None:
        super().__init__(context, "sequence_mean_token_mean")

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        whole_B = grpo_advantages(experience.rewards.sum(-1), experience.groups_B, noise_B=self._rounding(experience))
        return replace(experience, advantages=broadcast_to_tokens(whole_B, experience.mask))

    def _rounding(self, experience: Experience) -> Tensor:
        """Estimate the rounding error of each reward, which a division by a tiny deviation would turn into an advantage."""
        # The KL penalty is a difference of log-probs, whose rounding is all there is while the scores are equal.
        resolution = torch.finfo(self.context.backbone.model.dtype).eps
        size_B = (experience.logprobs.abs() + experience.ref_logprobs.abs()).sum(-1)
        return experience.kl_coefficient * resolution * size_B
