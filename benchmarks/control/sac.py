"""Soft actor-critic for continuous actions: twin critics, a tanh-squashed Gaussian, and a temperature that holds the entropy.

Shapes: B batch, O observation, A action. Actions are in [-1, 1] here; only the environment sees them times its bound.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from environments import Act, Environments, Space
from networks import Gaussian, mlp
from replay import Replay, Transitions
from selfeval.algorithms.q_learning import sac_temperature_loss, td_target, twin_critic_loss


@dataclass(frozen=True)
class SAC:
    """Settings. The target entropy is -1 nat per action dimension, as in the paper."""

    steps: int  # of all environments together, with one update for each
    environments: int
    batch: int = 256
    gamma: float = 0.99
    learning_rate: float = 1e-3
    averaging: float = 0.005  # Polyak coefficient of the target critics, applied at every update
    first_steps: int = 100  # drawn uniformly, before the first update
    buffer: int = 100_000


class Actor(nn.Module):
    """Map observations to a Gaussian whose samples tanh squashes into [-1, 1]."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.body = mlp(space.observations, 2 * space.actions, activation=nn.ReLU, last_gain=0.01)

    def forward(self, observations: Tensor) -> Gaussian:
        mean, log_std = self.body(observations).chunk(2, -1)
        return Gaussian(mean, log_std.clamp(-20, 2))

    def draw(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """An action, differentiable in the network, and its log-density.

        log π(a) = log N(u) − Σ log(1 − tanh² u),   a = tanh u;   Haarnoja et al. 2018, appendix C
        (https://arxiv.org/abs/1812.05905). log(1 − tanh² u) = 2 (log 2 − u − softplus(−2u)) does not round to −inf.
        """
        found = self(observations)
        wide = found.sample()
        squashing = (2 * (math.log(2) - wide - softplus(-2 * wide))).sum(-1)
        return wide.tanh(), found.logprobs(wide) - squashing


class TwinQ(nn.Module):
    """Two critics of an action."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(mlp(space.observations + space.actions, 1, activation=nn.ReLU) for _ in range(2))

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((observations, actions), -1)
        first, second = (body(both)[..., 0] for body in self.bodies)
        return first, second


class Agent(NamedTuple):
    """All trained networks, and the target critics."""

    actor: Actor
    critics: TwinQ
    slow_critics: TwinQ
    log_alpha: Tensor


def train(settings: SAC, environments: Environments) -> Act:
    """Train a policy; return its deterministic version."""
    space = environments.space
    if space.bound is None:
        raise ValueError("SAC here is for continuous actions, and this task has a choice of actions: take PPO, TRPO or DQN")
    bound, critics = space.bound, TwinQ(space)
    agent = Agent(Actor(space), critics, copy.deepcopy(critics).requires_grad_(False), torch.zeros((), requires_grad=True))
    learns = (agent.actor.parameters(), critics.parameters(), [agent.log_alpha])
    optimizers = [torch.optim.Adam(parameters, lr=settings.learning_rate, fused=True) for parameters in learns]
    replay, observations_EO = Replay(settings.buffer), environments.reset()
    while replay.count < settings.steps:
        actions_EA = _explore(agent.actor, observations_EO, uniform=replay.count < settings.first_steps)
        step = environments.step(bound * actions_EA)
        replay.add(observations_EO, actions_EA, step)
        observations_EO = step.observations_EO
        for _ in range(environments.count if replay.count >= settings.first_steps else 0):
            update(replay.draw(settings.batch), agent, optimizers, settings)
    return lambda observations: bound * agent.actor(observations).mode().tanh()


@torch.no_grad()
def _explore(actor: Actor, observations_EO: Tensor, *, uniform: bool) -> Tensor:
    actions_EA, _ = actor.draw(observations_EO)
    return torch.rand_like(actions_EA) * 2 - 1 if uniform else actions_EA


def update(batch: Transitions, agent: Agent, optimizers: list[torch.optim.Adam], settings: SAC) -> None:
    """Update the critics, the actor, the temperature and the target critics once."""
    actor, critics, temperature = optimizers
    alpha = agent.log_alpha.detach().exp()
    _step(critics, critic_loss(batch, agent, alpha, settings.gamma))
    agent.critics.requires_grad_(False)
    actions_BA, logprobs_B = agent.actor.draw(batch.observations_BO)
    values_B = torch.minimum(*agent.critics(batch.observations_BO, actions_BA))
    _step(actor, (alpha * logprobs_B - values_B).mean())
    agent.critics.requires_grad_(True)
    _step(temperature, sac_temperature_loss(agent.log_alpha, -logprobs_B, target_entropy=-float(actions_BA.shape[-1])).mean())
    with torch.no_grad():
        for slow, fast in zip(agent.slow_critics.parameters(), agent.critics.parameters(), strict=True):
            slow.lerp_(fast, settings.averaging)


def critic_loss(batch: Transitions, agent: Agent, alpha: Tensor, gamma: float) -> Tensor:
    """Return the squared errors of both critics on y = r + γ (1 − terminated) (min q̄(s', a') − α log π(a')), a' drawn."""
    with torch.no_grad():
        actions_BA, logprobs_B = agent.actor.draw(batch.successors_BO)
        next_values_B = torch.minimum(*agent.slow_critics(batch.successors_BO, actions_BA)) - alpha * logprobs_B
    target_B = td_target(batch.rewards_B, batch.terminated_B, next_values_B, gamma=gamma)
    # The critics value the action that was taken, and no other: an axis of one action.
    first_B1, second_B1 = (values_B[:, None] for values_B in agent.critics(batch.observations_BO, batch.actions))
    return twin_critic_loss(first_B1, second_B1, torch.zeros_like(target_B, dtype=torch.long), target_B).mean() / 2


def _step(optimizer: torch.optim.Adam, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
