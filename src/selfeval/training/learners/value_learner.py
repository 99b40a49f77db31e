"""Base class of the value learners: Q roles that guide decoding, a replay buffer, and an automatic temperature.

The policy's weights do not change. Replies are sampled from pi_ref exp(mean_k Q_k / beta), normalised, in which b(s) cancels
(`rollout/guide.py`). beta is adapted by gradient ascent on the dual until the KL divergence of the guided replies from the
reference is `kl_target` nats per reply, like the temperature of SAC: Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.controllers import dual_kl_coefficient
from selfeval.algorithms.kl import k1
from selfeval.algorithms.masked import masked_mean, masked_sum
from selfeval.algorithms.q_learning import huber_loss
from selfeval.config import ValueLearnerConfig
from selfeval.rollout.guide import Guide
from selfeval.training.context import LearnerContext, QuestionPrompts, Samples
from selfeval.training.experience import Experience, RewardScale, collect
from selfeval.training.learners.action_values import (
    Q_ROLES,
    TARGET_ROLES,
    UNIT,
    VALUE_ROLE,
    add_q_roles,
    chosen_token_values,
    gradients,
    polyak_update,
    role_loss,
    values_of_role,
)
from selfeval.training.learners.learner import Learner, Peak
from selfeval.training.policy_updates import Optimizers, learning_rate_factor, mean_of
from selfeval.training.replay import Replay, Replayed, replayed

__all__ = ["ValueLearner"]

_TEMPERATURE_RATE = 0.05
"""Change of log beta in an iteration whose KL differs from the target by the target itself."""

Step = dict[str, tuple[Replayed, Tensor]]
"""For each role a minibatch and the targets of its tokens."""


class ValueLearner(Learner):
    """Learn Q functions from replayed replies; a subclass computes their targets.

    Args:
        context: shared context of policy learning; the rewards have no KL penalty.
        others: additional roles to train with `critic_learning_rate`. Default: none.
    """

    def __init__(self, context: LearnerContext, others: Sequence[str] = ()) -> None:
        add_q_roles(context)
        config, settings = context.config, context.config.settings_as(ValueLearnerConfig)
        self.context, self.settings = context, settings
        rates = {
            **dict.fromkeys(Q_ROLES, config.learning_rate),
            **dict.fromkeys((VALUE_ROLE, *others), settings.critic_learning_rate),
        }
        # The target networks have no optimizer, but their weights change, so they are checkpointed.
        self.roles = (*rates, *TARGET_ROLES.values())
        self.optimizers = Optimizers(context.backbone, rates, config)
        self.replay = Replay(settings.replay)
        self.automatic = config.kl_control != "fixed"
        self.beta = UNIT if self.automatic else config.kl_coefficient

    def guidance(self) -> Guide:
        return Guide(Q_ROLES, UNIT / self.beta)

    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        return collect(self.context, prompts, iteration, self.guidance())

    @abstractmethod
    def with_targets(self, pool: Replayed) -> Replayed:
        """Return the replies with `taken` and `targets` filled in."""

    def scoring_peaks(self, replies: int) -> Sequence[Peak]:
        """Declare the passes of the target networks, which hold as much as those of the roles themselves."""
        return [
            Peak(role, partial(self._value, role), replies) for role in (TARGET_ROLES[Q_ROLES[0]], TARGET_ROLES[VALUE_ROLE])
        ]

    def update_peaks(self, replies: int) -> Sequence[Peak]:
        count = min(self.context.config.minibatch, replies)
        trained = tuple(self.optimizers.by_role)
        # Replies from the buffer rarely have the same question.
        return [Peak(role, partial(self._planned_loss, role), count, per_prompt=1) for role in trained]

    def _value(self, role: str, rows: Experience) -> None:
        values_of_role(self.context, role, replayed(rows))

    def _planned_loss(self, role: str, rows: Experience) -> Tensor:
        pool = replayed(rows)
        return role_loss(self.context, role, pool, pool.targets, huber_loss)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        self.replay.add(experience)
        rows = [self._step(parts, iteration) for parts in self._steps(len(experience.scores_B), iteration)]
        return {**mean_of(rows), **self._follow_kl(experience.sliced(self.own_rows), iteration)}

    def _steps(self, count: int, iteration: int) -> Iterator[Step]:
        """Yield the steps of an iteration; each epoch draws `count` replies and recomputes their targets."""
        config = self.context.config
        for epoch in range(config.epochs):
            rng = random.Random(f"{self.context.seed}/replay/{iteration}/{epoch}")
            # Computed again in every epoch, because the previous one has moved the target networks.
            pool = self.with_targets(self.replay.sample(self.context.backbone, count, rng))
            parts, size = self._shares(pool), len(pool.mask)
            # A different order per role, so the twins do not see the same minibatches.
            orders = {role: torch.tensor(rng.sample(range(size), size), device=pool.mask.device) for role in parts}
            for start in range(0, size, config.minibatch):
                picked = {role: order[start : start + config.minibatch] for role, order in orders.items()}
                yield {role: (pool.rows(index), parts[role][index]) for role, index in picked.items()}

    def _shares(self, pool: Replayed) -> dict[str, Tensor]:
        """Compute the target of each role: the target of Q minus the current output of the other roles.

        The mean error is subtracted from the targets of the Q roles, like centring the advantages of a policy gradient. While
        the values lag behind rising rewards, every sampled token has a positive error, and the Q roles would imitate whatever
        was sampled. The fixed point, at which all errors are 0, does not change.
        """
        one_BR, other_BR, state_BR = (chosen_token_values(self.context, role, pool) for role in (*Q_ROLES, VALUE_ROLE))
        rest_BR, weights_BR = pool.targets - state_BR, pool.weights
        shares = {VALUE_ROLE: pool.targets - (one_BR + other_BR) / 2}
        for role, said_BR in zip(Q_ROLES, (one_BR, other_BR), strict=True):
            error = masked_sum(weights_BR * (rest_BR - said_BR), pool.mask) / masked_sum(weights_BR, pool.mask)
            shares[role] = rest_BR - error
        return shares

    def _step(self, parts: Step, iteration: int) -> dict[str, float]:
        losses, norms = {}, {}
        for role, (part, targets_BR) in parts.items():
            losses[role] = gradients(self.context, role, part, targets_BR, huber_loss)
            norms[role] = self.optimizers.step(role, iteration)
        # After all roles have stepped, so the targets follow weights of the same step.
        polyak_update(self.context.backbone, self.settings.target_share)
        part = parts[VALUE_ROLE][0]
        return {
            "q_loss": fmean(losses[role] for role in Q_ROLES),
            "state_loss": losses[VALUE_ROLE],
            "q": float(masked_mean(part.taken, part.mask)),
            "grad_norm": fmean(norms[role] for role in Q_ROLES),
            **self.step_others(part, iteration),
        }

    def step_others(self, part: Replayed, iteration: int) -> dict[str, float]:
        """Step the additional roles on a minibatch and return their metrics; does nothing by default."""
        return {}

    def _follow_kl(self, guided: Experience, iteration: int) -> dict[str, float]:
        """Update the temperature and return metrics of the guided replies."""
        config = self.context.config
        kl = float(masked_sum(k1(guided.logprobs, guided.ref_logprobs), guided.mask)) / len(guided.scores_B)
        found = {
            "kl": kl,
            "kl_coefficient": self.beta,
            "entropy": -float(masked_mean(guided.logprobs, guided.mask)),
            "learning_rate": config.learning_rate * self.optimizers.scale * learning_rate_factor(iteration, config),
        }
        if self.automatic:
            # The dual step is proportional to nats; relative to the target, one rate suits every target.
            rate = _TEMPERATURE_RATE / config.kl_target
            self.beta = dual_kl_coefficient(self.beta, kl, target=config.kl_target, learning_rate=rate)
        return found

    def state(self) -> dict[str, Any]:
        return {"beta": self.beta, "replay": self.replay.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.beta = float(state["beta"])
        self.replay.load(state["replay"])
