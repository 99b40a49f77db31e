"""DPO: the policy's own log-ratios to the reference are the reward model; it learns from pairs, with soft labels.

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; online, on pairs that the policy has just sampled: Guo et al. 2024,
https://arxiv.org/abs/2402.04792. Of the replies to a question the best and the worst make the pair, and its label is what the
Bradley-Terry model says of their rewards, so that the optimum is the KL-regularised one, pi_ref exp(R / beta) / Z. `beta` is
the KL coefficient of the loop.

With `policy.dpo.pairs = "kept"` it trains on the pairs that the judge labelled, and samples replies for the metrics only.

Shapes: N pairs, 2N rows (all chosen, then all rejected), R reply tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfeval.algorithms.masked import masked_sum, zero_padding
from selfeval.algorithms.preference_losses import dpo_loss, dpo_margin
from selfeval.backbone.budget import Phase
from selfeval.backbone.sequences import Sequences, pad_sequences
from selfeval.training.context import POLICY, LearnerContext, Prompt, Samples
from selfeval.training.experience import Experience, RewardScale, collect, policy_logprobs, reference_logprobs, rows_of
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.learners.learner import Learner
from selfeval.training.policy_updates import Optimizers, learning_rate_factor, mean_of
from selfeval.training.schedules import draw

__all__ = ["DPO"]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of replies, rows 0 .. N-1 chosen and N .. 2N-1 rejected, with reference log-probs and P(chosen is better)."""

    batch: Sequences
    ref_BR: Tensor
    label_N: Tensor

    def some(self, index_N: Tensor) -> _Pairs:
        rows = torch.cat([index_N, index_N + len(self.label_N)])
        return _Pairs(rows_of(self.batch, rows), self.ref_BR[rows], self.label_N[index_N])


class DPO(Learner):
    """Direct preference optimisation."""

    def __init__(self, context: LearnerContext) -> None:
        self.context = context
        self.roles = (POLICY,)
        self.optimizers = Optimizers(context.backbone, {POLICY: context.config.learning_rate}, context.config)

    def collect(self, prompts: Sequence[Prompt], iteration: int) -> Samples:
        return collect(self.context, prompts, iteration)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        config = self.context.config
        kept = config.settings.reads_kept_pairs
        pairs = self._kept(len(experience.scores_B) // 2, iteration) if kept else _best_and_worst(experience)
        rows = []
        for epoch in range(config.epochs):
            order = list(range(len(pairs.label_N)))
            random.Random(f"{self.context.seed}/pairs/{iteration}/{epoch}").shuffle(order)
            for start in range(0, len(order), config.minibatch // 2):
                index_N = torch.tensor(order[start : start + config.minibatch // 2], device=pairs.label_N.device)
                values = self._gradients(pairs.some(index_N), experience.kl_coefficient)
                rows.append({**values, "grad_norm": self.optimizers.step(POLICY, iteration)})
        rate = config.learning_rate * self.optimizers.scale * learning_rate_factor(iteration, config)
        return {**mean_of(rows), "learning_rate": rate}

    def _gradients(self, pairs: _Pairs, beta: float) -> dict[str, float]:
        """Adds the gradient of a minibatch's mean loss; means over its pairs."""
        context, count = self.context, len(pairs.label_N)
        parameters = list(context.backbone.parameters(POLICY).values())

        def of_group(group: list[int]) -> tuple[float, float, float]:
            part = pairs.some(torch.tensor(group, device=pairs.label_N.device))
            logprobs, entropy, _ = policy_logprobs(context.backbone, part.batch, context.config.temperature)
            assert entropy is not None
            ours_N, theirs_N = logprobs.sum(-1).chunk(2), zero_padding(part.ref_BR, part.batch.mask_BR).sum(-1).chunk(2)
            margin_N = dpo_margin(ours_N[0], ours_N[1], theirs_N[0], theirs_N[1])
            summed = dpo_loss(margin_N, part.label_N, beta=beta).sum()
            found = summed.item(), float((margin_N > 0).sum()), float(masked_sum(entropy.detach(), part.batch.mask_BR))
            add_gradients(summed / count, parameters)
            return found

        sizes = pairs.batch.attention_BT.sum(-1)
        together = (2 * torch.maximum(sizes[:count], sizes[count:])).tolist()
        with context.backbone.acting_as(POLICY):
            groups = context.backbone.budget.in_groups(Phase.UPDATE, together, context.batch_tokens, of_group)
            loss, right, entropy = (sum(column) for column in zip(*(found for _, found in groups), strict=True))
        tokens = int(pairs.batch.mask_BR.sum())
        return {"policy_loss": loss / count, "pair_accuracy": right / count, "entropy": entropy / tokens}

    def _kept(self, count: int, iteration: int) -> _Pairs:
        """Pairs that the judge labelled: a window of an endless sequence of shuffles."""
        context = self.context
        picked = [context.pairs[i] for i in draw(len(context.pairs), iteration - 1, count, f"{context.seed}/kept")]
        prompts = [p.prompt for p in picked] * 2
        batch = pad_sequences(context.backbone, prompts, [p.chosen for p in picked] + [p.rejected for p in picked])
        label_N = torch.tensor([p.label for p in picked], device=batch.mask_BR.device)
        return _Pairs(batch, reference_logprobs(context, batch), label_N)


def _best_and_worst(experience: Experience) -> _Pairs:
    """Of each question's replies the one with the highest and the one with the lowest reward, the KL penalty left out."""
    kl_BR = zero_padding(experience.logprobs - experience.ref_logprobs, experience.mask)
    rewards_B = experience.rewards.sum(-1) + experience.kl_coefficient * kl_BR.sum(-1)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(experience.groups_B.tolist()):
        members.setdefault(group, []).append(row)
    rewards = rewards_B.tolist()
    best = [max(rows, key=lambda row: rewards[row]) for rows in members.values()]
    worst = [min(reversed(rows), key=lambda row: rewards[row]) for rows in members.values()]
    rows_B = torch.tensor([*best, *worst], device=rewards_B.device)
    chosen_N, rejected_N = rewards_B[rows_B].chunk(2)
    return _Pairs(rows_of(experience.policy_batch, rows_B), experience.ref_logprobs[rows_B], (chosen_N - rejected_N).sigmoid())
