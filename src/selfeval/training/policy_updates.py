"""Building blocks of the update step: minibatches, gradient accumulation over micro-batches, and the roles' optimizers.

Shapes: B replies, R reply tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from selfeval.algorithms.masked import masked_sum
from selfeval.algorithms.policy_losses import approximate_kl
from selfeval.algorithms.value_losses import clipped_value_loss
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import Measure
from selfeval.backbone.roles import Backbone
from selfeval.config import CriticConfig, PolicyConfig
from selfeval.training.checkpoint import role_optimizer
from selfeval.training.context import CRITIC, POLICY, LearnerContext
from selfeval.training.experience import Experience, RewardScale, policy_logprobs, present, token_values
from selfeval.training.gradient_accumulation import add_gradients, clip_gradients, sum_gradients

__all__ = [
    "Optimizers",
    "PerToken",
    "PolicyLoss",
    "critic_gradients",
    "critic_loss",
    "learning_rate_factor",
    "mean_of",
    "minibatches",
    "policy_gradients",
    "policy_loss",
]


PerToken = Callable[[Tensor, Experience], Tensor]
"""A function of the log-probs under the current policy and of the corresponding rows of the experience."""


def learning_rate_factor(iteration: int, config: PolicyConfig) -> float:
    """Compute the multiplier of the peak learning rate: linear warm-up, then linear decay to a tenth."""
    rising = min(1.0, iteration / max(1, config.warmup_iterations + 1))
    # Measured from the first iteration, not from the end of the warm-up, so the peak is slightly below 1 after a warm-up.
    falling = 1.0 - 0.9 * (iteration - 1) / max(1, config.iterations)
    return min(rising, falling)


class Optimizers:
    """One AdamW optimizer per trained role.

    Args:
        backbone: the model that has the roles.
        rates: peak learning rate of each role.
        config: warm-up, number of iterations and maximum gradient norm.
    """

    def __init__(self, backbone: Backbone, rates: Mapping[str, float], config: PolicyConfig) -> None:
        self.parameters: dict[str, dict[str, nn.Parameter]] = {role: backbone.roles.parameters(role) for role in rates}
        self.rates, self.config, self.processes = dict(rates), config, backbone.budget.processes
        self.scale = 1.0
        self.by_role = {role: role_optimizer(self.parameters[role], rate) for role, rate in rates.items()}

    def step(self, role: str, iteration: int) -> float:
        """Take one step along the accumulated gradients and return their norm before clipping.

        Raises:
            NotFiniteError: a gradient is NaN or infinite; the weights are unchanged.
        """
        optimizer, named = self.by_role[role], self.parameters[role]
        for group in optimizer.param_groups:
            group["lr"] = self.rates[role] * self.scale * learning_rate_factor(iteration, self.config)
        sum_gradients(named.values(), self.processes)
        norm = clip_gradients(named, self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm


def minibatches(experience: Experience, context: LearnerContext, iteration: int) -> Iterator[Experience]:
    """Yield the minibatches of all epochs, shuffled by seed, iteration and epoch.

    Replies to one question stay together, because they share the pass of their prompt.
    """
    # The shuffle depends on these numbers alone, not on a generator's state, so a resumed run draws the same minibatches.
    config = context.config
    for epoch in range(config.epochs):
        order = _shuffled(experience.groups_B.tolist(), random.Random(f"{context.seed}/policy/{iteration}/{epoch}"))
        for start in range(0, len(order), config.minibatch):
            yield experience.rows(torch.tensor(order[start : start + config.minibatch], device=experience.mask.device))


def _shuffled(groups: Sequence[int], generator: random.Random) -> list[int]:
    """Shuffle the rows and the groups, and return the rows group by group."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    order = list(members.values())
    generator.shuffle(order)
    for rows in order:
        generator.shuffle(rows)
    return [row for rows in order for row in rows]


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average metrics over the steps of an iteration."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


class PolicyLoss(NamedTuple):
    """Loss of a micro-batch, and the quantities it was computed from.

    Attributes:
        objective: scalar to minimise: `loss` less the entropy bonus.
        loss: weighted sum over tokens, a scalar.
        logprobs, entropy: `[B, R]`.
    """

    objective: Tensor
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def policy_loss(
    context: LearnerContext,
    rows: Experience,
    weights_BR: Tensor,
    loss: PerToken,
    *,
    entropy_bonus: float = 0.0,
    tokens: int = 1,
) -> PolicyLoss:
    """Compute the loss of a micro-batch under the policy, which must be acting.

    Args:
        rows: the micro-batch.
        weights_BR: weight of each token's loss.
        loss: per token, from the log-probs now and the rows they belong to; multiplied by the rows' importance weights.
        entropy_bonus: weight of the mean entropy of the minibatch in the objective. Default: 0.
        tokens: number of tokens in the minibatch. Default: 1.
    """
    wanted: tuple[Measure, ...] = ("logprobs", "entropy") if entropy_bonus else ("logprobs",)
    found = policy_logprobs(context.backbone, rows.policy_batch, context.config.temperature, gradient=wanted)
    logprobs, entropy = found.logprobs, present(found.entropy)
    summed = masked_sum(rows.weighted(loss(logprobs, rows)) * weights_BR, rows.mask)
    bonus = entropy_bonus * masked_sum(entropy, rows.mask) / tokens if entropy_bonus else 0.0
    return PolicyLoss(summed - bonus, summed, logprobs, entropy)


def policy_gradients(
    context: LearnerContext,
    part: Experience,
    weights_BR: Tensor,
    loss: PerToken,
    *,
    entropy_bonus: float = 0.0,
    clip_fraction: PerToken | None = None,
) -> dict[str, float]:
    """Accumulate the policy gradient of a minibatch over micro-batches.

    Args:
        context: shared context of policy learning.
        part: the minibatch.
        weights_BR: weight of each token in the loss of the minibatch, 0 where the mask is False. The weights are computed over
            the whole minibatch, so the gradient does not depend on the size of the micro-batches.
        loss: computes the loss of each token.
        entropy_bonus: weight of the entropy in the objective. Default: 0.
        clip_fraction: Optional. Computes the share of clipped tokens. Default: not measured.

    Returns:
        `policy_loss`, and metrics averaged over tokens.
    """
    backbone = context.backbone
    tokens, parameters = int(part.mask.sum()), list(backbone.roles.parameters(POLICY).values())

    def of_group(group: list[int]) -> dict[str, float]:
        index = torch.tensor(group, device=part.mask.device)
        rows = part.rows(index)
        made = policy_loss(context, rows, weights_BR[index], loss, entropy_bonus=entropy_bonus, tokens=tokens)
        found = _policy_sums(rows, made.logprobs.detach(), made.entropy.detach(), clip_fraction)
        # The weights already average over the minibatch; this undoes the division by `tokens` that the other sums need.
        found["policy_loss"] = made.loss.item() * tokens
        # Last: a micro-batch that runs out of memory is repeated in halves, and must not have added anything.
        add_gradients(made.objective, parameters)
        return found

    sums: dict[str, float] = defaultdict(float)
    with backbone.acting_as(POLICY):
        batch = part.policy_batch
        groups = backbone.budget.in_groups(
            Phase.UPDATE, batch.sizes, context.batch_tokens, of_group, batch.prompt_numbers(backbone)
        )
        for _, found in groups:
            for name, value in found.items():
                sums[name] += value / tokens
    return dict(sums)


@torch.no_grad()
def _policy_sums(rows: Experience, logprobs: Tensor, entropy: Tensor, clip_fraction: PerToken | None) -> dict[str, float]:
    """Compute the metrics of one micro-batch, summed over its tokens."""
    count = int(rows.mask.sum())
    found = {"entropy": float(masked_sum(entropy, rows.mask))}
    if clip_fraction is not None:
        found["clip_fraction"] = float(clip_fraction(logprobs, rows)) * count
    # This and the clip fraction are means; times the number of tokens, they can be summed over micro-batches.
    found["approximate_kl"] = float(approximate_kl(logprobs, rows.logprobs, rows.mask)) * count
    # Before the first step this is 0 up to rounding, unless sampling and scoring disagree (watchdog `ratio_not_one`).
    found["ratio_gap"] = float(masked_sum((logprobs - rows.logprobs).exp().sub(1).abs(), rows.mask))
    return found


def critic_loss(context: LearnerContext, rows: Experience, scale: RewardScale) -> Tensor:
    """Compute the clipped value loss of a micro-batch under the critic, which must be acting; a sum over tokens."""
    clip = context.config.settings_as(CriticConfig).value_clip
    # The head predicts raw scores, like the evaluator that it starts from; the returns are in units of whitened reward.
    values = scale.units(token_values(context, rows.critic_batch))
    return masked_sum(clipped_value_loss(values, present(rows.values), present(rows.returns), clip=clip), rows.mask)


def critic_gradients(context: LearnerContext, part: Experience, scale: RewardScale) -> dict[str, float]:
    """Accumulate the gradient of the clipped value loss of a minibatch (mean over tokens) in the critic."""
    backbone = context.backbone
    tokens, parameters = int(part.mask.sum()), list(backbone.roles.parameters(CRITIC).values())

    def of_group(group: list[int]) -> float:
        loss = critic_loss(context, part.rows(torch.tensor(group, device=part.mask.device)), scale)
        found = loss.item()
        add_gradients(loss / tokens, parameters)
        return found

    total = 0.0
    with backbone.acting_as(CRITIC):
        batch = part.critic_batch
        groups = backbone.budget.in_groups(
            Phase.UPDATE, batch.sizes, context.batch_tokens, of_group, batch.prompt_numbers(backbone)
        )
        for _, found in groups:
            total += found / tokens
    return {"value_loss": total}
