"""ILQL, implicit Q-learning for language: the value of a state is an expectile of the values of the tokens drawn there.

Snell et al. 2022, https://arxiv.org/abs/2206.11871; Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169.

It never asks for the value of a token that no reply had, so that it may learn from replies of any policy: every second one is
the reference's own, for what the guided policy would not try again; the others are guided. V is the role `critic`, with the
evaluator's adapter at the start, and reads what the evaluator reads; its head starts at 0, where Q starts, because what parts
the two adds up along a reply. There is no term for tokens outside of the data (CQL): sum_a pi_ref exp((Q - b) / c) = 1 keeps
their values, as a whole, where those of the data leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from selfeval.algorithms.masked import masked_sum
from selfeval.algorithms.q_learning import expectile_loss
from selfeval.backbone.budget import Phase
from selfeval.backbone.sequences import Sequences, reply_hidden
from selfeval.rollout.engine import Rollout
from selfeval.training.experience import Experience, over_microbatches, sample
from selfeval.training.gradients import add_gradients
from selfeval.training.learners.action_values import lower_values, q_targets
from selfeval.training.learners.ppo import ensure_critic
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.replay import Replayed
from selfeval.training.setting import CRITIC, Prompt, Samples, Setting

__all__ = ["ILQL"]


class ILQL(ValueLearner):
    """Twin Q functions and an expectile V."""

    def __init__(self, setting: Setting) -> None:
        ensure_critic(setting)
        nn.init.zeros_(setting.backbone.heads[CRITIC].weight)
        nn.init.zeros_(setting.backbone.heads[CRITIC].bias)
        super().__init__(setting, {CRITIC: setting.config.critic_learning_rate})

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        asked = [p for p in prompts for _ in range(self.setting.config.replies_per_question)]
        seed = self.setting.sampling_seed(iteration)
        rollouts: list[Rollout | None] = [None] * len(asked)
        rollouts[::2] = sample(self.setting, asked[::2], seed)
        rollouts[1::2] = sample(self.setting, asked[1::2], seed + 1, self.guide)
        return Samples(asked, [rollout for rollout in rollouts if rollout])

    def guided(self, experience: Experience) -> Experience:
        return experience.rows(torch.arange(1, len(experience.scores_B), 2, device=experience.mask.device))

    def with_targets(self, pool: Replayed) -> Replayed:
        config, backbone, taken = self.setting.config, self.setting.backbone, lower_values(self.setting, pool)
        with backbone.acting_as(CRITIC):
            values = over_microbatches(self.setting, pool.critic_batch, self._values)
        traces = torch.full_like(taken, config.gae_lambda)
        targets = q_targets(pool.rewards, taken, values, traces, pool.mask, gamma=config.gamma)
        return replace(pool, taken=taken, targets=targets)

    def _values(self, batch: Sequences) -> Tensor:
        """V before each token, in units of the start; the critic must be acting."""
        return self.setting.backbone.score(CRITIC, reply_hidden(self.setting.backbone, batch))

    def step_others(self, part: Replayed, iteration: int) -> dict[str, float]:
        setting, tokens = self.setting, int(part.mask.sum())
        backbone, parameters = setting.backbone, list(setting.backbone.parameters(CRITIC).values())

        def of_group(group: list[int]) -> float:
            rows = part.rows(torch.tensor(group, device=part.mask.device))
            errors = rows.taken - self._values(rows.critic_batch)
            loss = masked_sum(expectile_loss(errors, expectile=setting.config.expectile), rows.mask)
            found = loss.item()
            add_gradients(loss / tokens, parameters)
            return found

        sizes = part.critic_batch.attention_BT.sum(-1).tolist()
        with backbone.acting_as(CRITIC):
            groups = backbone.budget.in_groups(Phase.UPDATE, sizes, setting.batch_tokens, of_group)
            total = sum(found for _, found in groups)
        self.optimizers.step(CRITIC, iteration)
        return {"value_loss": total / tokens}
