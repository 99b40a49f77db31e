"""Proximal policy optimisation: several epochs of minibatches on every rollout, under the clipped surrogate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from environments import Act, Environments
from networks import Critic, Policy
from rollout import Batch, learn_from, rollouts
from selfeval.algorithms.masked import masked_mean, whiten
from selfeval.algorithms.policy_losses import ppo_clip_loss
from selfeval.algorithms.value_losses import clipped_value_loss


@dataclass(frozen=True)
class PPO:
    """Settings; the learning rate, and the clip if `anneal` is set, fall linearly to 0 over all steps."""

    steps: int  # of all environments together
    environments: int
    horizon: int  # steps of every environment in a rollout
    epochs: int
    minibatch: int
    gamma: float
    lam: float
    learning_rate: float
    clip: float = 0.2
    anneal: bool = False
    entropy_weight: float = 0.0
    gradient_norm: float = 0.5


def train(settings: PPO, environments: Environments) -> Act:
    """Train a policy; return its greedy version."""
    policy, critic = Policy(environments.space), Critic(environments.space)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, eps=1e-5, fused=True)
    iterations = settings.steps // (settings.horizon * environments.count)
    for iteration, rollout in zip(range(iterations), rollouts(environments, policy, settings.horizon), strict=False):
        left = 1 - iteration / iterations if settings.anneal else 1.0
        optimizer.param_groups[0]["lr"] = settings.learning_rate * left
        batch = learn_from(rollout, policy, critic, gamma=settings.gamma, lam=settings.lam)
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(batch.advantages_N)).split(settings.minibatch):
                optimizer.zero_grad()
                loss(Batch(*(part[rows] for part in batch)), policy, critic, settings, clip=settings.clip * left).backward()
                nn.utils.clip_grad_norm_(parameters, settings.gradient_norm)
                optimizer.step()
    return lambda observations: policy(observations).mode()


def loss(batch: Batch, policy: Policy, critic: Critic, settings: PPO, *, clip: float) -> torch.Tensor:
    """Return the loss: clipped surrogate on whitened advantages, the critic's error, and the entropy."""
    distribution, kept_N = policy(batch.observations), torch.ones_like(batch.advantages_N, dtype=torch.bool)
    surrogate_N = ppo_clip_loss(
        distribution.logprobs(batch.actions),
        batch.old_logprobs_N,
        whiten(batch.advantages_N, kept_N),
        clip_low=clip,
        clip_high=clip,
    )
    value_N = clipped_value_loss(critic(batch.observations), batch.old_values_N, batch.returns_N, clip=None)
    total_N = surrogate_N + value_N - settings.entropy_weight * distribution.entropy()
    return masked_mean(total_N, kept_N)
