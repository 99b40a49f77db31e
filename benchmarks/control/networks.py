"""Small networks, and the distributions over actions that they parametrise.

This file holds only what a language model would provide: log-probabilities, entropies, samples. The losses and targets
are in `selfeval.algorithms`. Shapes: ... any, A action (numbers, or choices), O observation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from environments import Space
from selfeval.algorithms.kl import categorical_entropy, categorical_kl


def mlp(
    inputs: int, outputs: int, *, width: int = 64, activation: type[nn.Module] = nn.Tanh, last_gain: float = 1.0
) -> nn.Sequential:
    """Two hidden layers; orthogonal weights, which Andrychowicz et al. 2021 and every public PPO use."""
    sizes, layers = (inputs, width, width), []
    for before, after in itertools.pairwise(sizes):
        layers += [_orthogonal(nn.Linear(before, after), math.sqrt(2)), activation()]
    return nn.Sequential(*layers, _orthogonal(nn.Linear(sizes[-1], outputs), last_gain))


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Distribution(Protocol):
    """A distribution over actions at every observation."""

    def sample(self) -> Tensor: ...

    def mode(self) -> Tensor: ...

    def logprobs(self, actions: Tensor) -> Tensor: ...

    def entropy(self) -> Tensor: ...

    def kl_from(self, old: Distribution) -> Tensor:
        """KL(old‖self) in nats."""
        ...

    def frozen(self) -> Distribution:
        """Return a detached copy, which later changes of the parameters do not affect."""
        ...


@dataclass(frozen=True)
class Categorical:
    """Categorical distribution over A choices."""

    logits: Tensor

    def sample(self) -> Tensor:
        # The largest of logits + Gumbel noise is a draw from the softmax, in a third of multinomial's time.
        return (self.logits - torch.empty_like(self.logits).exponential_().log()).argmax(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def logprobs(self, actions: Tensor) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]

    def entropy(self) -> Tensor:
        return categorical_entropy(self.logits)

    def kl_from(self, old: Categorical) -> Tensor:
        return categorical_kl(old.logits, self.logits)

    def frozen(self) -> Categorical:
        return Categorical(self.logits.detach().clone())


@dataclass(frozen=True)
class Gaussian:
    """Gaussian over A independent numbers."""

    mean: Tensor
    log_std: Tensor

    def sample(self) -> Tensor:
        return self.mean + self.log_std.exp() * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def logprobs(self, actions: Tensor) -> Tensor:
        """−½ z² − log σ − ½ log 2π, summed over the numbers of an action; z = (a − μ) / σ."""
        z = (actions - self.mean) / self.log_std.exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).expand_as(self.mean).sum(-1)

    def kl_from(self, old: Gaussian) -> Tensor:
        """log σ/σ_old + (σ_old² + (μ_old − μ)²) / 2σ² − ½, summed."""
        variance = (2 * self.log_std).exp()
        spread = ((2 * old.log_std).exp() + (old.mean - self.mean).square()) / (2 * variance)
        return (self.log_std - old.log_std + spread - 0.5).sum(-1)

    def frozen(self) -> Gaussian:
        # Cloned: the spread is a parameter, and without a copy the old spread would move with the new one.
        return Gaussian(self.mean.detach().clone(), self.log_std.detach().clone())


class Policy(nn.Module):
    """Map observations to a distribution: categorical, or Gaussian with one spread for all observations."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        # Nearly uniform at the start: the first rollouts explore.
        self.body = mlp(space.observations, space.actions, last_gain=0.01)
        self.log_std = None if space.bound is None else nn.Parameter(torch.zeros(space.actions))

    def forward(self, observations: Tensor) -> Distribution:
        found = self.body(observations)
        return Categorical(found) if self.log_std is None else Gaussian(found, self.log_std)


class Critic(nn.Module):
    """Map observations to a value."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.body = mlp(space.observations, 1)

    def forward(self, observations: Tensor) -> Tensor:
        values: Tensor = self.body(observations)[..., 0]
        return values
