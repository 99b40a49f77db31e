"""RAFT, best-of-n distillation: the policy imitates the best reply to each question and ignores the others.

Dong et al. 2023, https://arxiv.org/abs/2304.06767. The best reply is the one with the highest reward including the KL penalty,
so of two replies with equal scores the one that is likelier under the reference wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from selfeval.algorithms.masked import broadcast_to_tokens
from selfeval.algorithms.policy_losses import clip_fraction, policy_gradient_loss
from selfeval.training.context import Samples
from selfeval.training.experience import Experience, RewardScale, present
from selfeval.training.learners.learner import Peak
from selfeval.training.learners.policy_gradient import PolicyGradient

__all__ = ["RAFT"]

_USUAL = 0.2
"""The usual clip range of PPO."""


class RAFT(PolicyGradient):
    """Imitation of the best reply of each group: its advantage is 1, all others 0, and there is no clipping."""

    def advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        best_B = _best(experience.rewards.sum(-1), experience.groups_B.tolist())
        return replace(experience, advantages=broadcast_to_tokens(best_B, experience.mask))

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        # Before the minibatches are drawn: replies with advantage 0 would cost a pass each and dilute the mean over tokens.
        chosen = experience.rows(present(experience.advantages).any(-1).nonzero()[:, 0])
        return super().update(chosen, scale, iteration)

    def update_peaks(self, replies: int) -> Sequence[Peak]:
        """Declare those of a policy gradient, on the best reply to each question."""
        found = super().update_peaks(min(replies, self.context.config.questions_per_iteration))
        return [replace(peak, per_prompt=1) for peak in found]

    def clip_fraction(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        """Return the share of tokens outside the usual clip range of PPO, although imitation is not clipped."""
        advantages_BR = present(rows.advantages)
        return clip_fraction(logprobs_BR, rows.logprobs, advantages_BR, rows.mask, clip_low=_USUAL, clip_high=_USUAL)

    def loss(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        return policy_gradient_loss(logprobs_BR, present(rows.advantages))


def _best(rewards_B: Tensor, groups: Sequence[int]) -> Tensor:
    """Return 1 for the reply with the highest reward in each group (the first one in a tie), 0 for the others."""
    best: dict[int, int] = {}
    rewards = rewards_B.tolist()
    for row, group in enumerate(groups):
        if group not in best or rewards[row] > rewards[best[group]]:
            best[group] = row
    return torch.zeros_like(rewards_B).index_fill(0, torch.tensor(list(best.values()), device=rewards_B.device), 1.0)
