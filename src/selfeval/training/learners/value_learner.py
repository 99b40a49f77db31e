"""What the value learners share: Q roles that guide decoding, a replay of past replies, and an automatic temperature.

The policy's weights are never touched. It samples pi_ref exp(mean_k Q_k / beta), normalised, of which b(s) cancels
(`rollout/guide.py`); beta moves until the KL divergence of the guided replies from the reference is `kl_target` nats per reply,
by gradient ascent on the dual, as the temperature of SAC does: Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.controllers import dual_kl_coefficient
from selfeval.algorithms.kl import k1
from selfeval.algorithms.masked import masked_mean, masked_sum
from selfeval.algorithms.q_learning import huber_loss
from selfeval.rollout.guide import Guide
from selfeval.training.experience import Experience, RewardScale, collect
from selfeval.training.learners.action_values import STATE, TARGETS, TWINS, UNIT, add_q_roles, drawn, follow, gradients
from selfeval.training.replay import Replay, Replayed
from selfeval.training.setting import Prompt, Samples, Setting
from selfeval.training.steps import Optimizers, learning_rate_factor, mean_of

__all__ = ["ValueLearner"]

_TEMPERATURE_RATE = 0.05
"""Change of log beta in an iteration whose KL is off by the whole target."""

Step = dict[str, tuple[Replayed, Tensor]]
"""For each role a minibatch, and what the role is to say of its tokens."""


class ValueLearner(ABC):
    """Learns Q functions from remembered replies; a subclass says what they are to learn.

    Args:
        setting: what the loop was given; its reward has no KL penalty.
        others: further roles that learn, with `critic_learning_rate`.
    """

    def __init__(self, setting: Setting, others: Sequence[str] = ()) -> None:
        add_q_roles(setting)
        config = setting.config
        self.setting = setting
        rates = {**dict.fromkeys(TWINS, config.learning_rate), **dict.fromkeys((STATE, *others), config.critic_learning_rate)}
        self.roles: tuple[str, ...] = (*rates, *TARGETS.values())
        self.optimizers = Optimizers(setting.backbone, rates, config)
        self.replay = Replay(config.replay)
        self.automatic = config.kl_control != "fixed"
        self.beta = UNIT if self.automatic else config.kl_coefficient

    guided_rows = slice(None)
    """Which of an iteration's replies were sampled with the guide."""

    @property
    def guide(self) -> Guide:
        """What bends the policy's replies now."""
        return Guide(TWINS, UNIT / self.beta)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        return collect(self.setting, prompts, iteration, self.guide)

    def guided(self, experience: Experience) -> Experience:
        """The replies that were sampled with the guide."""
        rows = torch.arange(len(experience.scores_B), device=experience.mask.device)
        return experience.rows(rows[self.guided_rows])

    def advantages(self, experience: Experience, scale: RewardScale) -> Experience:
        return experience

    @abstractmethod
    def with_targets(self, pool: Replayed) -> Replayed:
        """The replies with the value of each token by the targets, and what the Q functions are to learn."""

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        self.replay.add(experience)
        rows = [self._step(parts, iteration) for parts in self._steps(len(experience.scores_B), iteration)]
        return {**mean_of(rows), **self._follow_kl(self.guided(experience), iteration)}

    def _steps(self, count: int, iteration: int) -> Iterator[Step]:
        """The steps of an iteration: in each epoch `count` replies are drawn, and their targets made anew."""
        config = self.setting.config
        for epoch in range(config.epochs):
            rng = random.Random(f"{self.setting.seed}/replay/{iteration}/{epoch}")
            pool = self.with_targets(self.replay.sample(self.setting.backbone, count, rng))
            parts, size = self._shares(pool), len(pool.mask)
            orders = {role: torch.tensor(rng.sample(range(size), size), device=pool.mask.device) for role in parts}
            for start in range(0, size, config.minibatch):
                picked = {role: order[start : start + config.minibatch] for role, order in orders.items()}
                yield {role: (pool.rows(index), parts[role][index]) for role, index in picked.items()}

    def _shares(self, pool: Replayed) -> dict[str, Tensor]:
        """What each role is to say: the target less what the others say now.

        The Q roles learn from errors less their mean, as advantages are centred for a policy gradient: while all values lag
        behind rising rewards, every drawn token is worth more than its Q, and they would imitate whatever is drawn. Where all
        errors are 0 there is nothing to take away.
        """
        one_BR, other_BR, state_BR = (drawn(self.setting, role, pool) for role in (*TWINS, STATE))
        rest_BR, weights_BR = pool.targets - state_BR, pool.weights
        shares = {STATE: pool.targets - (one_BR + other_BR) / 2}
        for role, said_BR in zip(TWINS, (one_BR, other_BR), strict=True):
            error = masked_sum(weights_BR * (rest_BR - said_BR), pool.mask) / masked_sum(weights_BR, pool.mask)
            shares[role] = rest_BR - error
        return shares

    def _step(self, parts: Step, iteration: int) -> dict[str, float]:
        losses, norms = {}, {}
        for role, (part, targets_BR) in parts.items():
            losses[role] = gradients(self.setting, role, part, targets_BR, huber_loss)
            norms[role] = self.optimizers.step(role, iteration)
        follow(self.setting.backbone, self.setting.config.target_share)
        part = parts[STATE][0]
        return {
            "q_loss": fmean(losses[role] for role in TWINS),
            "state_loss": losses[STATE],
            "q": float(masked_mean(part.taken, part.mask)),
            "grad_norm": fmean(norms[role] for role in TWINS),
            **self.step_others(part, iteration),
        }

    def step_others(self, part: Replayed, iteration: int) -> dict[str, float]:
        """A step of the further roles on a minibatch."""
        return {}

    def _follow_kl(self, guided: Experience, iteration: int) -> dict[str, float]:
        """Metrics of the guided replies; moves the temperature."""
        config = self.setting.config
        kl = float(masked_sum(k1(guided.logprobs, guided.ref_logprobs), guided.mask)) / len(guided.scores_B)
        found = {
            "kl": kl,
            "kl_coefficient": self.beta,
            "entropy": -float(masked_mean(guided.logprobs, guided.mask)),
            "learning_rate": config.learning_rate * self.optimizers.scale * learning_rate_factor(iteration, config),
        }
        if self.automatic:
            rate = _TEMPERATURE_RATE / config.kl_target
            self.beta = dual_kl_coefficient(self.beta, kl, target=config.kl_target, learning_rate=rate)
        return found

    def state(self) -> dict[str, Any]:
        return {"beta": self.beta, "replay": self.replay.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.beta = float(state["beta"])
        self.replay.load(state["replay"])
