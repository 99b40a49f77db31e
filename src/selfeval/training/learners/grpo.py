"""GRPO: the replies to one question are each other's baseline, in units of their deviation; no critic.

Shao et al. 2024, https://arxiv.org/abs/2402.03300. Every reply weighs the same, whatever its length (eq. 3 there). One thing
differs from the paper: the KL penalty is part of the reward, where its gradient is right, and not a k3 term of the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfeval.algorithms.group_advantages import grpo_advantages
from selfeval.algorithms.masked import broadcast_to_tokens
from selfeval.training.experience import Experience
from selfeval.training.learners.policy_gradient import PolicyGradient
from selfeval.training.setting import Setting

__all__ = ["grpo"]


def grpo(setting: Setting) -> PolicyGradient:
    """Group relative policy optimisation."""

    resolution = torch.finfo(setting.backbone.model.dtype).eps

    def advantage(experience: Experience) -> Tensor:
        # The KL penalty is a difference of log-probs, whose rounding is all there is while the scores are equal.
        size_B = (experience.logprobs.abs() + experience.ref_logprobs.abs()).sum(-1)
        noise_B = experience.kl_coefficient * resolution * size_B
        whole_B = grpo_advantages(experience.rewards.sum(-1), experience.groups_B, noise_B=noise_B)
        return broadcast_to_tokens(whole_B, experience.mask)

    return PolicyGradient(setting, advantage, "sequence_mean_token_mean")
