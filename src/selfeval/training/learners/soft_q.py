"""Soft Q-learning held near the reference: SAC-discrete whose policy is the guided one, pi_ref exp(Q / beta).

Christodoulou 2019, https://arxiv.org/abs/1910.07207, with the KL divergence from the reference in the place of the entropy
(Jaques et al. 2017, section 3, https://arxiv.org/abs/1611.02796). The guided policy is the optimum of its actor loss, so that
there is no actor to train; the value of a state is beta log sum_a pi_ref exp(min_k Q_k / beta), by the twins' targets. It
samples with what it has learned, and its optimum is the KL-regularised one of the policy-gradient learners.
"""

from __future__ import annotations

from dataclasses import replace

from selfeval.training.learners.action_values import q_targets, soft_values
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.replay import Replayed

__all__ = ["SoftQ"]


class SoftQ(ValueLearner):
    """Twin soft Q functions with an automatic temperature."""

    def with_targets(self, pool: Replayed) -> Replayed:
        config = self.setting.config
        values, taken = soft_values(self.setting, pool, self.beta)
        targets = q_targets(pool.rewards, taken, values, pool.mask, gamma=config.gamma, lam=config.gae_lambda)
        return replace(pool, taken=taken, targets=targets)
