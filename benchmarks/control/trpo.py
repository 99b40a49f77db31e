"""Trust-region policy optimisation: one step along the natural gradient per rollout, as far as the real KL allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from environments import Act, Environments
from networks import Critic, Policy
from rollout import Batch, learn_from, rollouts
from selfeval.algorithms.masked import whiten
from selfeval.algorithms.policy_losses import importance_ratio
from selfeval.algorithms.trust_region import (
    LineSearch,
    backtracking_line_search,
    fisher_vector_product,
    flatten,
    natural_gradient_step,
    unflatten,
)
from selfeval.algorithms.value_losses import clipped_value_loss


@dataclass(frozen=True)
class TRPO:
    """Settings. The critic has a separate optimizer and number of epochs."""

    steps: int  # of all environments together
    environments: int
    horizon: int  # steps of every environment in a rollout
    gamma: float
    lam: float
    critic_epochs: int
    critic_minibatch: int = 128
    critic_rate: float = 1e-3
    kl_bound: float = 0.01  # nats per action
    damping: float = 0.1
    iterations: int = 15  # of conjugate gradient


def train(settings: TRPO, environments: Environments) -> Act:
    """Train a policy; return its greedy version."""
    policy, critic = Policy(environments.space), Critic(environments.space)
    optimizer = torch.optim.Adam(critic.parameters(), lr=settings.critic_rate, fused=True)
    updates = settings.steps // (settings.horizon * environments.count)
    for _, rollout in zip(range(updates), rollouts(environments, policy, settings.horizon), strict=False):
        batch = learn_from(rollout, policy, critic, gamma=settings.gamma, lam=settings.lam)
        improve(policy, batch, settings)
        for _ in range(settings.critic_epochs):
            for rows in torch.randperm(len(batch.returns_N)).split(settings.critic_minibatch):
                optimizer.zero_grad()
                values_N, returns_N = critic(batch.observations[rows]), batch.returns_N[rows]
                clipped_value_loss(values_N, values_N.detach(), returns_N, clip=None).mean().backward()
                optimizer.step()
    return lambda observations: policy(observations).mode()


def improve(policy: Policy, batch: Batch, settings: TRPO) -> LineSearch:
    """Move the policy by the longest tried step with a KL within the bound and a surrogate that is no worse."""
    parameters = list(policy.parameters())
    old = policy(batch.observations).frozen()
    advantages_N = whiten(batch.advantages_N, torch.ones_like(batch.advantages_N, dtype=torch.bool))

    def surrogate() -> Tensor:
        ratio_N = importance_ratio(policy(batch.observations).logprobs(batch.actions), batch.old_logprobs_N)
        return (ratio_N * advantages_N).mean()

    def kl() -> Tensor:
        return policy(batch.observations).kl_from(old).mean()

    before = surrogate()
    gradient_N = flatten(torch.autograd.grad(before, parameters))
    step = natural_gradient_step(
        lambda vector_N: fisher_vector_product(kl, parameters, vector_N, damping=settings.damping),
        gradient_N,
        kl_bound=settings.kl_bound,
        iterations=settings.iterations,
    )
    start_N = flatten([parameter.detach() for parameter in parameters])

    def go(fraction: float) -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, unflatten(start_N + fraction * step.step_N, parameters), strict=True):
                parameter.copy_(value)

    @torch.no_grad()
    def evaluate(fraction: float) -> tuple[float, float]:
        go(fraction)
        return kl().item(), (surrogate() - before).item()

    found = backtracking_line_search(evaluate, kl_bound=settings.kl_bound)
    go(found.fraction)
    return found
