"""KL-regularised soft Q-learning: discrete SAC whose policy is the guided one, pi_ref exp(Q / beta).

Christodoulou 2019, https://arxiv.org/abs/1910.07207, with the KL divergence from the reference instead of the entropy (Jaques
et al. 2017, section 3, https://arxiv.org/abs/1611.02796). The guided policy is the closed-form optimum of SAC's actor loss, so
there is no actor to train. The value of a state is beta log sum_a pi_ref exp(min_k Q_k / beta), by the target networks. It is
trained on replies of the guided policy, and its optimum is the KL-regularised optimum of the policy-gradient learners.

Replayed tokens are weighted by min(1, pi / mu), with pi the current guided policy and mu the one that sampled them (Retrace:
Munos et al. 2016, https://arxiv.org/abs/1606.02647), both in the traces and in the loss, whose optimum does not depend on the
weights. Without the weights, old replies keep lowering tokens that are no longer sampled, by many nats, and tokens that are in
no reply rise instead.
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
        # min(1, pi / mu) with log pi = log pi_ref + (Q - V) / beta: V is the normaliser of the guided policy at the same beta.
        ratios = (pool.ref_logprobs + (taken - values) / self.beta - pool.logprobs).clamp_max(0.0).exp()
        traces = settings.gae_lambda * ratios
        targets = q_targets(pool.rewards, taken, values, traces, pool.mask, gamma=settings.gamma)
        return replace(pool, taken=taken, targets=targets, weights=ratios)
