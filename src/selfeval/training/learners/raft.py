"""RAFT, best-of-n distillation: of the replies to each question the best is imitated, the others are dropped.

Dong et al. 2023, https://arxiv.org/abs/2304.06767. "Best" is by the reward with its KL penalty, so that of two replies with the
same score the one that the reference finds likelier is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfeval.algorithms.masked import broadcast_to_tokens
from selfeval.algorithms.policy_losses import policy_gradient_loss
from selfeval.training.experience import Experience, RewardScale
from selfeval.training.learners.policy_gradient import PolicyGradient
from selfeval.training.setting import Setting

__all__ = ["RAFT"]


class RAFT(PolicyGradient):
    """Imitation of the best reply of each group: an advantage of 1 for it, and no clip."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, _is_best, "token_mean")

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        chosen = experience.rows(experience.advantages.any(-1).nonzero()[:, 0])
        return super().update(chosen, scale, iteration)

    def loss(self, logprobs_BR: Tensor, rows: Experience) -> Tensor:
        return policy_gradient_loss(logprobs_BR, rows.advantages)


def _is_best(experience: Experience) -> Tensor:
    return broadcast_to_tokens(_best(experience.rewards.sum(-1), experience.groups_B.tolist()), experience.mask)


def _best(rewards_B: Tensor, groups: Sequence[int]) -> Tensor:
    """1 at the reply of each group with the highest reward (the first of equal ones), 0 elsewhere."""
    best: dict[int, int] = {}
    rewards = rewards_B.tolist()
    for row, group in enumerate(groups):
        if group not in best or rewards[row] > rewards[best[group]]:
            best[group] = row
    return torch.zeros_like(rewards_B).index_fill(0, torch.tensor(list(best.values()), device=rewards_B.device), 1.0)
