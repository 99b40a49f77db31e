"""ReMax: the baseline of a question is what the policy's own greedy reply gets; no critic.

Li et al. 2024, https://arxiv.org/abs/2310.10505. Each question costs one more reply, which is scored and not learned from.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from selfeval.algorithms.group_advantages import remax_advantages
from selfeval.rollout.engine import Request, generate
from selfeval.training.experience import Experience, RewardScale, observe
from selfeval.training.learners.policy_gradient import PolicyGradient
from selfeval.training.setting import POLICY, Prompt, Samples, Setting

__all__ = ["ReMax"]


class ReMax(PolicyGradient):
    """REINFORCE with a greedy baseline."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, self._advantage, "token_mean")
        self._greedy = Samples([], [])
        self._scale = RewardScale(0.0, 1.0, 1.0)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        """The sampled replies; the greedy ones are kept aside."""
        setting = self.setting
        with setting.backbone.acting_as(POLICY):
            requests = [Request(p.reply, temperature=0.0) for p in prompts]
            rollouts = generate(setting.backbone, requests, max_new_tokens=setting.limit, seed=0, rows=setting.rows)
        self._greedy = Samples(prompts, rollouts)
        return super().collect(prompts, iteration)

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        self._scale = scale
        return super().advantages(experience, scale)

    def _advantage(self, experience: Experience) -> Tensor:
        setting, greedy = self.setting, self._greedy
        observed = observe(setting, greedy, setting.scorer(greedy), self._scale, experience.kl_coefficient)
        return remax_advantages(experience.rewards, experience.mask, observed.rewards.sum(-1)[experience.groups_B])
