"""Deep Q-learning: a replay buffer, a target network, double Q, and epsilon-greedy exploration."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from environments import Act, Environments
from networks import mlp
from replay import Replay, Transitions
from selfeval.algorithms.q_learning import double_dqn_target, huber_loss, td_error


@dataclass(frozen=True)
class DQN:
    """Settings. Exploration falls linearly from 1 to `least_exploration` over `exploration_steps`, the learning rate to 0."""

    steps: int  # of all environments together
    environments: int
    horizon: int  # steps of every environment between updates
    updates: int  # after each of those
    batch: int
    gamma: float
    learning_rate: float
    exploration_steps: int
    least_exploration: float
    target_every: int  # steps of all environments
    width: int = 64  # of the two hidden layers
    first_steps: int = 1000  # before the first update
    buffer: int = 100_000
    gradient_norm: float = 10.0


def train(settings: DQN, environments: Environments) -> Act:
    """Train action values; return the greedy policy."""
    space = environments.space
    q = mlp(space.observations, space.actions, width=settings.width, activation=nn.ReLU)
    target = copy.deepcopy(q).requires_grad_(False)
    optimizer = torch.optim.Adam(q.parameters(), lr=settings.learning_rate, fused=True)
    replay, observations_EO = Replay(settings.buffer), environments.reset()
    every = settings.horizon * environments.count
    while replay.count < settings.steps:
        actions_E = explore(q, observations_EO, _exploration(replay.count, settings))
        step = environments.step(actions_E)
        replay.add(observations_EO, actions_E, step)
        observations_EO = step.observations_EO
        if replay.count >= settings.first_steps and replay.count % every == 0:
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - replay.count / settings.steps)
            for _ in range(settings.updates):
                optimizer.zero_grad()
                loss(replay.draw(settings.batch), q, target, settings.gamma).backward()
                nn.utils.clip_grad_norm_(q.parameters(), settings.gradient_norm)
                optimizer.step()
        if replay.count % settings.target_every < environments.count:
            target.load_state_dict(q.state_dict())
    return lambda observations: q(observations).argmax(-1)


def _exploration(steps: int, settings: DQN) -> float:
    return max(settings.least_exploration, 1 - (1 - settings.least_exploration) * steps / settings.exploration_steps)


@torch.no_grad()
def explore(q: nn.Module, observations_EO: Tensor, chance: float) -> Tensor:
    """Return the action of the largest value or, with this probability, a random one."""
    values_EA = q(observations_EO)
    anything_E = torch.randint(values_EA.shape[-1], values_EA.shape[:1])
    return torch.where(torch.rand(len(values_EA)) < chance, anything_E, values_EA.argmax(-1))


def loss(batch: Transitions, q: nn.Module, target: nn.Module, gamma: float) -> Tensor:
    """Return the Huber loss of the double-Q error."""
    with torch.no_grad():
        next_BA, target_next_BA = q(batch.successors_BO), target(batch.successors_BO)
    wanted_B = double_dqn_target(batch.rewards_B, batch.terminated_B, next_BA, target_next_BA, gamma=gamma)
    return huber_loss(td_error(q(batch.observations_BO), batch.actions, wanted_B)).mean()
