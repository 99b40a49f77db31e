"""ILQL, implicit Q-learning for language: the value of a state is an expectile of the values of the tokens drawn there.

Snell et al. 2022, https://arxiv.org/abs/2206.11871; Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169.

It never asks for the value of a token that no reply had, so that it may learn from replies of any policy: every second one is
the reference's own, for what the guided policy would not try again; the others are guided. V is the role `critic`, with the
evaluator's adapter at the start, and reads what the evaluator reads. There is no term for tokens outside of the data (CQL):
sum_a pi_ref exp((Q - b) / c) = 1 keeps their values, as a whole, where those of the data leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from selfeval.algorithms.q_learning import expectile_loss
from selfeval.rollout.engine import Rollout
from selfeval.training.experience import sample
from selfeval.training.learners.action_values import STATE, TARGETS, TWINS, add_value_role, drawn, gradients, q_targets
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.replay import Replayed
from selfeval.training.setting import CRITIC, Prompt, Samples, Setting

__all__ = ["ILQL"]


class ILQL(ValueLearner):
    """Twin Q functions and an expectile V."""

    def __init__(self, setting: Setting) -> None:
        add_value_role(setting, CRITIC)
        super().__init__(setting, [CRITIC])

    guided_rows = slice(1, None, 2)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        asked = [p for p in prompts for _ in range(self.setting.config.replies_per_question)]
        seed = self.setting.sampling_seed(iteration)
        rollouts: list[Rollout | None] = [None] * len(asked)
        rollouts[::2] = sample(self.setting, asked[::2], seed)
        rollouts[1::2] = sample(self.setting, asked[1::2], seed + 1, self.guide)
        return Samples(asked, [rollout for rollout in rollouts if rollout])

    def with_targets(self, pool: Replayed) -> Replayed:
        config = self.setting.config
        lower = torch.minimum(*(drawn(self.setting, TARGETS[role], pool) for role in TWINS))
        taken = drawn(self.setting, TARGETS[STATE], pool) + lower
        values = drawn(self.setting, CRITIC, pool)
        traces = torch.full_like(taken, config.gae_lambda)
        targets = q_targets(pool.rewards, taken, values, traces, pool.mask, gamma=config.gamma)
        return replace(pool, taken=taken, targets=targets)

    def step_others(self, part: Replayed, iteration: int) -> dict[str, float]:
        loss = partial(expectile_loss, expectile=self.setting.config.expectile)
        found = gradients(self.setting, CRITIC, part, part.taken, loss)
        self.optimizers.step(CRITIC, iteration)
        return {"value_loss": found}
