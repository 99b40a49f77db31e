"""GRPO: advantages relative to the other replies to the same question, without a critic.

| loss      | advantage                 | ratio       | weighting                          | paper            |
|-----------|---------------------------|-------------|------------------------------------|------------------|
| `grpo`    | (R - mean) / std of group | per token   | every reply equal                  | arXiv:2402.03300 |
| `dr_grpo` | R - mean of group         | per token   | sum over tokens / (B x max length) | arXiv:2503.20783 |
| `gspo`    | (R - mean) / std of group | whole reply | every reply equal                  | arXiv:2507.18071 |
| `dapo`    | (R - mean) / std of group | per token   | every token equal                  | arXiv:2503.14476 |

Unlike in the GRPO paper, the KL penalty is part of the reward, where its gradient is unbiased, instead of a k3 term in the
loss. With `dapo`, `clip_high` defaults to the higher value of DAPO. Its dynamic sampling is not implemented: a group with equal
rewards has zero advantages and is not resampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from selfeval.algorithms.group_advantages import grpo_advantages, mean_only_advantages
from selfeval.algorithms.masked import Aggregation, broadcast_to_tokens
from selfeval.algorithms.policy_losses import gspo_clip_fraction, gspo_loss
from selfeval.config import GRPOConfig
from selfeval.training.context import LearnerContext, Samples
from selfeval.training.experience import Experience, RewardScale, present
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient

__all__ = ["GRPO"]


class _Variant(NamedTuple):
    aggregation: Aggregation
    divides_by_deviation: bool = True
    whole_replies: bool = False


_VARIANTS: Mapping[str, _Variant] = {
    "grpo": _Variant("sequence_mean_token_mean"),
    "dr_grpo": _Variant("constant_length", divides_by_deviation=False),
    "gspo": _Variant("sequence_mean_token_mean", whole_replies=True),
    "dapo": _Variant("token_mean"),
}


class GRPO(ClippedPolicyGradient):
    """Group relative policy optimisation."""

    def __init__(self, context: LearnerContext) -> None:
        self.variant = _VARIANTS[context.config.settings_as(GRPOConfig).loss]
        super().__init__(context, self.variant.aggregation)

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        rewards_B, groups_B = experience.rewards.sum(-1), experience.groups_B
        if self.variant.divides_by_deviation:
            whole_B = grpo_advantages(rewards_B, groups_B, noise_B=self._rounding(experience))
        else:
            whole_B = mean_only_advantages(rewards_B, groups_B)
        return replace(experience, advantages=broadcast_to_tokens(whole_B, experience.mask))

    def loss(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        if not self.variant.whole_replies:
            return super().loss(logprobs_BR, rows)
        low, high = self.clip
        loss_B = gspo_loss(logprobs_BR, rows.logprobs, _of_replies(rows), rows.mask, clip_low=low, clip_high=high)
        # One loss per reply, repeated at its tokens: `sequence_mean_token_mean` then averages it back to the reply's loss.
        return broadcast_to_tokens(loss_B, rows.mask)

    def clip_fraction(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        if not self.variant.whole_replies:
            return super().clip_fraction(logprobs_BR, rows)
        low, high = self.clip
        return gspo_clip_fraction(
            logprobs_BR, rows.logprobs, _of_replies(rows), rows.mask, clip_low=low, clip_high=high, per="token"
        )

    def _rounding(self, experience: Experience) -> Tensor:
        """Estimate the rounding error of each reward, which division by a tiny deviation would turn into an advantage."""
        # The KL penalty is a difference of log-probs. If all scores are equal, the rewards differ by its rounding errors alone.
        resolution = torch.finfo(self.context.backbone.model.dtype).eps
        size_B = (experience.logprobs.abs() + experience.ref_logprobs.abs()).sum(-1)
        return experience.kl_coefficient * resolution * size_B


def _of_replies(rows: Experience) -> Tensor:
    """Return the advantage of each reply; all its tokens have the same."""
    return present(rows.advantages)[:, 0]
