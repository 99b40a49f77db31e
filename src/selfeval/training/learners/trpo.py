"""TRPO: one natural-gradient step per iteration, as long as the policy's exact KL allows; the critic learns as in PPO.

Schulman et al. 2015, https://arxiv.org/abs/1502.05477. The step is that of the policy's adapter alone, from all replies of the
iteration: a KL bound holds for one step from one policy, so there are no epochs and no clip for the policy. `trust_region` is
the bound at full speed. The length of a step follows the learning rate's schedule, and a KL goes with its square: warm-up,
decay and roll-backs shrink the bound by the square of their factor. A bound that stayed would keep the policy from settling,
for a natural step is as long beside the optimum, where its direction is noise, as far from it.
"""

from __future__ import annotations

from selfeval.training.experience import Experience, RewardScale
from selfeval.training.learners.ppo import PPO
from selfeval.training.natural_step import natural_step
from selfeval.training.setting import CRITIC, Setting
from selfeval.training.steps import Optimizers, critic_gradients, learning_rate_factor, mean_of, minibatches

__all__ = ["TRPO"]


class TRPO(PPO):
    """Trust-region policy optimisation with a critic."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.optimizers = Optimizers(setting.backbone, {CRITIC: setting.config.critic_learning_rate}, setting.config)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        config = self.setting.config
        speed = self.optimizers.scale * learning_rate_factor(iteration, config)
        bound = config.trust_region * speed**2
        values = natural_step(self.setting, experience, kl_bound=bound, entropy_bonus=self.floor.bonus)
        self.floor.see(values["entropy"])
        rows = [self._critic_step(part, scale, iteration) for part in minibatches(experience, self.setting, iteration)]
        return {**values, **mean_of(rows)}

    def _critic_step(self, part: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        values = critic_gradients(self.setting, part, scale)
        self.optimizers.step(CRITIC, iteration)
        return values
