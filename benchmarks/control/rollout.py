"""On-policy experience: rollout -> values -> advantages.

Shapes: E environments, T time, O observation, N = E T steps in one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from environments import Environments
from networks import Critic, Policy
from selfeval.algorithms.returns import gae


class Rollout(NamedTuple):
    """The next T steps of every environment."""

    observations_ETO: Tensor
    actions_ET: Tensor  # [E, T] choices or [E, T, A] numbers
    rewards_ET: Tensor
    terminated_ET: Tensor
    truncated_ET: Tensor
    successors_ETO: Tensor


class Batch(NamedTuple):
    """Samples of one update."""

    observations: Tensor  # [N, O]
    actions: Tensor  # [N] or [N, A]
    old_logprobs_N: Tensor
    old_values_N: Tensor
    advantages_N: Tensor
    returns_N: Tensor


def rollouts(environments: Environments, policy: Policy, steps: int) -> Iterator[Rollout]:
    """Yield rollouts of `steps` steps of every environment without end; the policy may change in between."""
    observations_EO = environments.reset()
    while True:
        columns = []
        for _ in range(steps):
            with torch.no_grad():
                actions = policy(observations_EO).sample()
            step = environments.step(actions)
            columns.append((observations_EO, actions, step.rewards_E, step.terminated_E, step.truncated_E, step.successors_EO))
            observations_EO = step.observations_EO
        yield Rollout(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))


@torch.no_grad()
def learn_from(rollout: Rollout, policy: Policy, critic: Critic, *, gamma: float, lam: float) -> Batch:
    """Return the advantages and returns of a rollout, under the policy that drew it and the current critic.

    An episode that its time limit truncates is not over: the critic's value of its last state is added to its last reward, as
    in Pardo et al. 2018, section 3 (https://arxiv.org/abs/1712.00378).
    """
    values_ET, next_values_ET = critic(rollout.observations_ETO), critic(rollout.successors_ETO)
    rewards_ET = rollout.rewards_ET + gamma * next_values_ET * rollout.truncated_ET
    ends_ET = rollout.terminated_ET | rollout.truncated_ET
    advantages_ET = gae(
        rewards_ET,
        values_ET,
        torch.ones_like(ends_ET),
        gamma=gamma,
        lam=lam,
        dones_BT=ends_ET,
        bootstrap_B=next_values_ET[:, -1],
    )
    logprobs_ET = policy(rollout.observations_ETO).logprobs(rollout.actions_ET)
    parts = (rollout.observations_ETO, rollout.actions_ET, logprobs_ET, values_ET, advantages_ET, advantages_ET + values_ET)
    return Batch(*(part.flatten(0, 1) for part in parts))
