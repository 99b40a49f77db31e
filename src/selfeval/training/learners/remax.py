"""ReMax: the baseline of a question is what the policy's own greedy reply gets; no critic.

Li et al. 2024, https://arxiv.org/abs/2310.10505. Each question costs one more reply, which is scored and not learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from selfeval.algorithms.group_advantages import remax_advantages
from selfeval.backbone.sequences import pad_sequences
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.training.experience import Experience, RewardScale, observe, over_microbatches, policy_logprobs
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
        """The sampled replies; the greedy ones, one to a question, are kept aside in the order of `Samples.groups`."""
        setting, once = self.setting, list({p.question_id: p for p in prompts}.values())
        with setting.backbone.acting_as(POLICY):
            requests = [Request(p.reply, temperature=0.0) for p in once]
            rollouts = generate(setting.backbone, requests, max_new_tokens=setting.limit, seed=0, rows=setting.rows)
            if setting.config.temperature != 1.0:
                rollouts = self._at_temperature(once, rollouts)
        self._greedy = Samples(once, rollouts)
        return super().collect(prompts, iteration)

    def _at_temperature(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Greedy replies with the log-probs of the temperature that the reference's are taken at."""
        setting, backbone = self.setting, self.setting.backbone
        batch = pad_sequences(backbone, [p.reply for p in prompts], [r.ids for r in rollouts])
        temperature = setting.config.temperature
        logprobs_BR = over_microbatches(setting, batch, lambda part: policy_logprobs(backbone, part, temperature).logprobs)
        return [replace(r, logprobs=tuple(row[: len(r.ids)])) for r, row in zip(rollouts, logprobs_BR.tolist(), strict=True)]

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        self._scale = scale
        return super().advantages(experience, scale)

    def _advantage(self, experience: Experience) -> Tensor:
        setting, greedy = self.setting, self._greedy
        observed = observe(setting, greedy, setting.scorer(greedy), self._scale, experience.kl_coefficient)
        return remax_advantages(experience.rewards, experience.mask, observed.rewards.sum(-1)[experience.groups_B])
