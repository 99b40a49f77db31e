"""TRPO: one natural-gradient step per iteration within a bound on the policy's exact KL; the critic is trained as in PPO.

Schulman et al. 2015, https://arxiv.org/abs/1502.05477. The step updates only the policy's adapter, from all replies of the
iteration. The KL bound holds for a single step from a fixed policy, so the policy has no epochs and no clipping.
`trust_region` is the bound at the peak of the learning rate schedule. The KL is proportional to the square of the step length,
so warm-up, decay and roll-backs scale the bound by the square of their factor. With a constant bound the policy could not
converge: a natural step has the same length near the optimum, where its direction is noise, as far from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.trust_region import flatten
from selfeval.config import TRPOConfig
from selfeval.training.context import CRITIC, POLICY, LearnerContext, QuestionPrompts, Samples
from selfeval.training.experience import Experience, RewardScale, collect
from selfeval.training.learners.learner import Learner, Peak
from selfeval.training.learners.policy_gradient import EntropyFloor, clip_advantages
from selfeval.training.learners.ppo import critic_scoring, critic_update, ensure_critic, with_generalised_advantages
from selfeval.training.natural_step import (
    FISHER_REPLIES,
    microbatch_fisher_product,
    microbatch_outcome,
    natural_step,
    surrogate_loss,
)
from selfeval.training.policy_updates import (
    Optimizers,
    critic_gradients,
    learning_rate_factor,
    mean_of,
    minibatches,
    policy_loss,
)

__all__ = ["TRPO"]

_CG_VECTORS = 6
"""Vectors of adapter weights held during a product with the Fisher matrix, besides its argument and the gradient: solution,
residual and search direction of conjugate gradient, the sum of the products so far, the undamped argument, and its norm's
temporary."""
_SEARCH_VECTORS = 4
"""Vectors held during the line search besides the two ends: gradient, step, direction, and the scaled step."""


class TRPO(Learner):
    """Trust-region policy optimisation with a critic."""

    def __init__(self, context: LearnerContext) -> None:
        ensure_critic(context)
        self.context, self.settings = context, context.config.settings_as(TRPOConfig)
        self.roles = (POLICY, CRITIC)
        self.optimizers = Optimizers(context.backbone, {CRITIC: self.settings.critic_learning_rate}, context.config)
        self.floor = EntropyFloor(self.settings.entropy_floor)

    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        return collect(self.context, prompts, iteration)

    def advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        found = with_generalised_advantages(self.context, experience, scale)
        return clip_advantages(found, self.settings.advantage_clip)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        speed = self.optimizers.scale * learning_rate_factor(iteration, self.context.config)
        bound = self.settings.trust_region * speed**2
        values = natural_step(self.context, experience, kl_bound=bound, entropy_bonus=self.floor.bonus)
        self.floor.update(values["entropy"])
        rows = [self._critic_step(part, scale, iteration) for part in minibatches(experience, self.context, iteration)]
        return {**values, **mean_of(rows)}

    def scoring_peaks(self, replies: int) -> Sequence[Peak]:
        return [critic_scoring(self.context, replies), Peak(POLICY, self._line_search, replies)]

    def update_peaks(self, replies: int) -> Sequence[Peak]:
        return [
            Peak(POLICY, self._surrogate, replies),
            Peak(POLICY, self._fisher_product, min(FISHER_REPLIES, replies)),
            critic_update(self.context, replies),
        ]

    @property
    def _planned_bonus(self) -> float:
        """A weight of the entropy bonus that is not 0 if the bonus can be added."""
        return 0.0 if self.settings.entropy_floor is None else 1.0

    def _surrogate(self, rows: Experience) -> Tensor:
        weights_BR = torch.ones_like(rows.logprobs)
        return policy_loss(self.context, rows, weights_BR, surrogate_loss, entropy_bonus=self._planned_bonus).objective

    def _fisher_product(self, rows: Experience) -> None:
        """Multiply once, with the other vectors of conjugate gradient in memory."""
        direction_N = flatten(list(self.context.backbone.roles.parameters(POLICY).values())).detach()
        others = [torch.zeros_like(direction_N) for _ in range(_CG_VECTORS)]
        microbatch_fisher_product(self.context, rows.policy_batch, direction_N)
        del others

    def _line_search(self, rows: Experience) -> None:
        """Evaluate one trial, with the gradient and the step in memory."""
        start_N = flatten(list(self.context.backbone.roles.parameters(POLICY).values()))
        others = [torch.zeros_like(start_N) for _ in range(_SEARCH_VECTORS)]
        weights_BR = torch.ones_like(rows.logprobs)
        microbatch_outcome(self.context, rows, weights_BR, start_N, start_N.clone(), entropy_bonus=self._planned_bonus)
        del others

    def _critic_step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        values = critic_gradients(self.context, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor.as_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.floor.load(state["floor"])
