"""Soft Q-learning held near the reference: SAC-discrete whose policy is the guided one, pi_ref exp(Q / beta).

Christodoulou 2019, https://arxiv.org/abs/1910.07207, with the KL divergence from the reference in the place of the entropy
(Jaques et al. 2017, section 3, https://arxiv.org/abs/1611.02796). The guided policy is the optimum of its actor loss, so that
there is no actor to train; the value of a state is beta log sum_a pi_ref exp(min_k Q_k / beta), by the twins' targets. It
samples with what it has learned, and its optimum is the KL-regularised one of the policy-gradient learners.

Remembered tokens count by min(1, pi / mu), pi the guided policy now and mu the one that drew them (Retrace: Munos et al. 2016,
https://arxiv.org/abs/1606.02647): in the traces, and in the loss, where the optimum is the same for any weights. Without them
old replies keep lowering, by many nats, tokens that are no longer sampled, and tokens that no reply had rise instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfeval.training.context import POLICY
from selfeval.training.experience import Experience
from selfeval.training.learners.action_values import q_targets, soft_values, values_above_state
from selfeval.training.learners.learner import Peak
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.replay import Replayed, replayed

__all__ = ["SoftQ"]


class SoftQ(ValueLearner):
    """Twin soft Q functions with an automatic temperature."""

    def scoring_peaks(self, replies: int) -> Sequence[Peak]:
        """Declare those of a value learner, and the values of the states, which are sums over the vocabulary."""
        return [*super().scoring_peaks(replies), Peak(POLICY, self._state_values, replies)]

    def _state_values(self, rows: Experience) -> None:
        values_above_state(self.context, replayed(rows), self.beta)

    def with_targets(self, pool: Replayed) -> Replayed:
        settings = self.settings
        values, taken = soft_values(self.context, pool, self.beta)
        ratios = (pool.ref_logprobs + (taken - values) / self.beta - pool.logprobs).clamp_max(0.0).exp()
        traces = settings.gae_lambda * ratios
        targets = q_targets(pool.rewards, taken, values, traces, pool.mask, gamma=settings.gamma)
        return replace(pool, taken=taken, targets=targets, weights=ratios)
