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

from selfeval.config import TRPOConfig
from selfeval.training.context import CRITIC, POLICY, LearnerContext, Prompt, Samples
from selfeval.training.experience import Experience, RewardScale, collect
from selfeval.training.learners.learner import Learner
from selfeval.training.learners.policy_gradient import EntropyFloor, clip_advantages
from selfeval.training.learners.ppo import ensure_critic, with_generalised_advantages
from selfeval.training.natural_step import natural_step
from selfeval.training.policy_updates import Optimizers, critic_gradients, learning_rate_factor, mean_of, minibatches

__all__ = ["TRPO"]


class TRPO(Learner):
    """Trust-region policy optimisation with a critic."""

    def __init__(self, context: LearnerContext) -> None:
        ensure_critic(context)
        self.context, self.settings = context, context.config.settings_as(TRPOConfig)
        self.roles = (POLICY, CRITIC)
        self.optimizers = Optimizers(context.backbone, {CRITIC: self.settings.critic_learning_rate}, context.config)
        self.floor = EntropyFloor(self.settings.entropy_floor)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
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

    def _critic_step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        values = critic_gradients(self.context, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor.as_json()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.floor.load(state["floor"])
