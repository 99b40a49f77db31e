"""ReMax: the baseline of a question is the reward of the policy's greedy reply; no critic.

Li et al. 2024, https://arxiv.org/abs/2310.10505. Each question needs one additional reply, which is scored but not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfeval.algorithms.group_advantages import remax_advantages
from selfeval.backbone.sequences import pad_sequences
from selfeval.rollout.requests import Request, Rollout
from selfeval.training.context import POLICY, QuestionPrompts, Samples
from selfeval.training.experience import (
    Experience,
    RewardScale,
    build_experience,
    over_microbatches,
    policy_logprobs,
)
from selfeval.training.learners.policy_gradient import ClippedPolicyGradient

__all__ = ["ReMax"]


class ReMax(ClippedPolicyGradient):
    """REINFORCE with a greedy baseline."""

    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        """Sample the replies, and the greedy baselines: one per question, in the order of `Samples.groups`."""
        context, once = self.context, list({p.question_id: p for p in prompts}.values())
        with context.backbone.acting_as(POLICY):
            requests = [Request(p.reply, temperature=0.0) for p in once]
            # Greedy decoding draws no random numbers, so the seed has no effect.
            rollouts = context.engine.generate(
                context.backbone,
                requests,
                max_new_tokens=context.limit,
                seed=0,
                batch_size=context.batch_size,
                thinking=context.thinking,
            )
            # Greedy log-probs are captured at temperature 1.
            if context.config.temperature != 1.0:
                rollouts = self._at_temperature(once, rollouts)
        return replace(super().collect(prompts, iteration), baselines=Samples(once, rollouts))

    def _at_temperature(self, prompts: Sequence[QuestionPrompts], rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Replace the log-probs of greedy replies by those at the sampling temperature.

        The reference's log-probs are computed at that temperature, and the KL penalty is meaningful only if both agree.
        """
        context, backbone = self.context, self.context.backbone
        batch = pad_sequences(backbone, [p.reply for p in prompts], [r.ids for r in rollouts])
        temperature = context.config.temperature
        logprobs_BR = over_microbatches(context, batch, lambda part: policy_logprobs(backbone, part, temperature).logprobs)
        return [replace(r, logprobs=tuple(row[: len(r.ids)])) for r, row in zip(rollouts, logprobs_BR.tolist(), strict=True)]

    def raw_advantages(self, samples: Samples, experience: Experience, scale: RewardScale) -> Experience:
        context, greedy = self.context, samples.baselines
        assert greedy is not None
        baselines = build_experience(context, greedy, context.scorer(greedy), scale, experience.kl_coefficient)
        baselines_B = baselines.rewards.sum(-1)[experience.groups_B]
        return replace(experience, advantages=remax_advantages(experience.rewards, experience.mask, baselines_B))
