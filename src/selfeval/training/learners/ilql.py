"""ILQL, implicit Q-learning for language: the value of a state is an expectile of the Q values of the tokens sampled there.

Snell et al. 2022, https://arxiv.org/abs/2206.11871; Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169.

It never queries the value of a token that is not in the data, so it can learn from replies of any policy. Half of the replies
are sampled from the reference, to cover tokens that the guided policy no longer tries; the other half is guided. V is the role
`critic`, which is initialised from the evaluator's adapter and reads the same prompt. A CQL term for out-of-data tokens is not
needed: the constraint sum_a pi_ref exp((Q - b) / c) = 1 bounds their values by those of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from selfeval.algorithms.q_learning import expectile_loss
from selfeval.config import ILQLConfig
from selfeval.rollout.requests import Rollout
from selfeval.training.context import CRITIC, LearnerContext, QuestionPrompts, Samples
from selfeval.training.experience import sample
from selfeval.training.learners.action_values import (
    Q_ROLES,
    TARGET_ROLES,
    VALUE_ROLE,
    add_value_role,
    chosen_token_values,
    gradients,
    q_targets,
)
from selfeval.training.learners.value_learner import ValueLearner
from selfeval.training.replay import Replayed

__all__ = ["ILQL"]


class ILQL(ValueLearner):
    """Twin Q functions and an expectile V."""

    def __init__(self, context: LearnerContext) -> None:
        add_value_role(context, CRITIC)
        super().__init__(context, [CRITIC])

    # Even rows are sampled from the reference, odd rows are guided; see `collect`.
    own_rows = slice(1, None, 2)

    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        asked = [p for p in prompts for _ in range(self.context.config.replies_per_question)]
        seed = self.context.sampling_seed(iteration)
        rollouts: list[Rollout | None] = [None] * len(asked)
        # Unguided: the weights of the policy never change, so these are replies of the reference.
        rollouts[::2] = sample(self.context, asked[::2], seed)
        # Another seed, or the n-th requests of both halves would use the same random numbers.
        rollouts[1::2] = sample(self.context, asked[1::2], seed + 1, self.guidance())
        return Samples(asked, [rollout for rollout in rollouts if rollout])

    def with_targets(self, pool: Replayed) -> Replayed:
        settings = self.settings
        # The minimum of the twins counters the overestimation of noisy values, as in `soft_values`.
        lower = torch.minimum(*(chosen_token_values(self.context, TARGET_ROLES[role], pool) for role in Q_ROLES))
        taken = chosen_token_values(self.context, TARGET_ROLES[VALUE_ROLE], pool) + lower
        values = chosen_token_values(self.context, CRITIC, pool)
        traces = torch.full_like(taken, settings.gae_lambda)
        targets = q_targets(pool.rewards, taken, values, traces, pool.mask, gamma=settings.gamma)
        return replace(pool, taken=taken, targets=targets)

    def step_others(self, part: Replayed, iteration: int) -> dict[str, float]:
        loss = partial(expectile_loss, expectile=self.context.config.settings_as(ILQLConfig).expectile)
        found = gradients(self.context, CRITIC, part, part.taken, loss)
        self.optimizers.step(CRITIC, iteration)
        return {"value_loss": found}
