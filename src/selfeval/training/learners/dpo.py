"""DPO and its relatives: the policy learns from pairs of replies; no critic and no clipped steps.

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; online, on pairs that the policy has just sampled: Guo et al. 2024,
https://arxiv.org/abs/2402.04792. The best and the worst reply to each question form a pair, labelled with the
Bradley-Terry probability of their rewards; the optimum is then the KL-regularised one, pi_ref exp(R / beta) / Z. `beta` is the
KL coefficient of the loop unless it is set.

With `policy.dpo.pairs = "kept"` it trains on the pairs that the judge labelled, and samples replies for the metrics only.
`policy.dpo.loss` selects the loss of a pair, one of the functions in algorithms/preference_losses.py. SimPO and ORPO need no
reference, and its log-probs of kept pairs are not computed for them.

Shapes: N pairs, 2N rows (all chosen, then all rejected), R reply tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfeval.algorithms.masked import masked_sum, zero_padding
from selfeval.algorithms.preference_losses import (
    dpo_loss,
    dpo_margin,
    ipo_loss,
    kto_baseline,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from selfeval.backbone.budget import Phase
from selfeval.config import DPOConfig
from selfeval.training.context import POLICY, LearnerContext, QuestionPrompts, Samples
from selfeval.training.experience import (
    Experience,
    RewardScale,
    collect,
    over_microbatches,
    policy_logprobs,
    present,
    reference_logprobs,
)
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.learners.learner import Learner
from selfeval.training.policy_updates import Optimizers, learning_rate_factor, mean_of
from selfeval.training.preference_pairs import Pairs, best_and_worst, kept_pairs, mismatched
from selfeval.training.schedules import draw

__all__ = ["DPO"]

_LEAST = -1e-6
"""Largest mean log-prob per token for ORPO: at 0 the odds are infinite."""


@dataclass(frozen=True)
class _LogProbs:
    """Log-probs of whole replies, and what else a loss reads; pairs as in `Pairs`.

    Attributes:
        policy, reference: summed over tokens, [2N]; no reference for losses without one.
        lengths: tokens of each reply, [2N].
        label: [N].
        baseline: KTO's reference point, a scalar.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    label: Tensor
    baseline: Tensor

    @property
    def margin(self) -> Tensor:
        """How much more than the reference the policy prefers chosen to rejected, [N]."""
        return dpo_margin(*self.policy.chunk(2), *present(self.reference).chunk(2))

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean log-prob per token of chosen and rejected, [N] each."""
        chosen, rejected = (self.policy / self.lengths).chunk(2)
        return chosen, rejected


def _sigmoid(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    return dpo_loss(found.margin, _smoothed(found.label, settings.label_smoothing), beta=beta)


def _ipo(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    return ipo_loss(found.margin, beta=beta)


def _robust(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    return robust_dpo_loss(found.margin, beta=beta, flip_rate=settings.flip_rate)


def _kto(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    """Chosen replies are the desirable ones, rejected replies the others; mean of the two of each pair."""
    good = torch.ones_like(found.policy, dtype=torch.bool)
    good[len(found.label) :] = False
    chosen, rejected = kto_loss(found.policy, present(found.reference), good, found.baseline, beta=beta).chunk(2)
    return (chosen + rejected) / 2


def _simpo(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    label = _smoothed(found.label, settings.label_smoothing)
    return simpo_loss(*found.means, label, beta=beta, gamma=settings.simpo_gamma)


def _orpo(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    chosen, rejected = (mean.clamp(max=_LEAST) for mean in found.means)
    return orpo_loss(chosen, rejected, -chosen, beta=beta)


def _smoothed(label: Tensor, share: float) -> Tensor:
    return label + share * (1 - 2 * label) if share else label


_LOSSES: dict[str, Callable[[_LogProbs, DPOConfig, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "kto": _kto,
    "simpo": _simpo,
    "orpo": _orpo,
    "robust": _robust,
}


class DPO(Learner):
    """Direct preference optimisation."""

    def __init__(self, context: LearnerContext) -> None:
        self.context, self.settings = context, context.config.settings_as(DPOConfig)
        self.roles = (POLICY,)
        self.optimizers = Optimizers(context.backbone, {POLICY: context.config.learning_rate}, context.config)

    def collect(self, prompts: Sequence[QuestionPrompts], iteration: int) -> Samples:
        return collect(self.context, prompts, iteration)

    def update(self, experience: Experience, scale: RewardScale, iteration: int) -> dict[str, float]:
        config = self.context.config
        beta = self.settings.beta_of(experience.kl_coefficient)
        rows = []
        for part in self._minibatches(self._pairs(experience, iteration), iteration):
            rows.append({**self._gradients(part, beta), "grad_norm": self.optimizers.step(POLICY, iteration)})
        rate = config.learning_rate * self.optimizers.scale * learning_rate_factor(iteration, config)
        return {**mean_of(rows), "learning_rate": rate}

    def _pairs(self, experience: Experience, iteration: int) -> Pairs:
        """Return the pairs of an iteration: sampled ones, or a window of an endless sequence of shuffles of the kept ones."""
        context, with_reference = self.context, self.settings.has_reference
        if not self.settings.reads_kept_pairs:
            return best_and_worst(experience, with_reference=with_reference)
        count = len(experience.scores_B) // 2
        picked = draw(len(context.pairs), iteration - 1, count, f"{context.seed}/kept")
        return kept_pairs(context, [context.pairs[i] for i in picked], with_reference=with_reference)

    def _minibatches(self, pairs: Pairs, iteration: int) -> Iterator[Pairs]:
        config = self.context.config
        for epoch in range(config.epochs):
            order = list(range(len(pairs.label_N)))
            random.Random(f"{self.context.seed}/pairs/{iteration}/{epoch}").shuffle(order)
            for start in range(0, len(order), config.minibatch // 2):
                yield pairs.some(torch.tensor(order[start : start + config.minibatch // 2], device=pairs.label_N.device))

    def _gradients(self, pairs: Pairs, beta: float) -> dict[str, float]:
        """Accumulate the gradient of a minibatch's mean loss; return means over its pairs."""
        context, count = self.context, len(pairs.label_N)
        parameters, baseline = list(context.backbone.roles.parameters(POLICY).values()), self._baseline(pairs)

        def of_group(group: list[int]) -> tuple[float, float, float]:
            part = pairs.some(torch.tensor(group, device=pairs.label_N.device))
            logprobs, entropy, _ = policy_logprobs(context.backbone, part.batch, context.config.temperature)
            found = _summed(part, logprobs, baseline)
            summed = _LOSSES[self.settings.loss](found, self.settings, beta).sum()
            values = summed.item(), _count_right(found), float(masked_sum(present(entropy).detach(), part.batch.mask_BR))
            add_gradients(summed / count, parameters)
            return values

        sizes = pairs.batch.attention_BT.sum(-1)
        together = (2 * torch.maximum(sizes[:count], sizes[count:])).tolist()
        with context.backbone.acting_as(POLICY):
            groups = context.backbone.budget.in_groups(Phase.UPDATE, together, context.batch_tokens, of_group)
            loss, right, entropy = (sum(column) for column in zip(*(found for _, found in groups), strict=True))
        tokens = int(pairs.batch.mask_BR.sum())
        return {"policy_loss": loss / count, "pair_accuracy": right / count, "entropy": entropy / tokens}

    def _baseline(self, pairs: Pairs) -> Tensor:
        """Estimate KTO's reference point over the minibatch; 0 for other losses, and if only one question is asked."""
        context, zero = self.context, torch.zeros((), device=pairs.label_N.device)
        others = mismatched(context, pairs.batch) if self.settings.loss == "kto" else None
        if others is None:
            return zero
        backbone, temperature = context.backbone, context.config.temperature
        with backbone.acting_as(POLICY):
            ours_BR = over_microbatches(context, others, lambda part: policy_logprobs(backbone, part, temperature).logprobs)
        theirs_BR = reference_logprobs(context, others)
        return kto_baseline(*(zero_padding(x_BR, others.mask_BR).sum(-1) for x_BR in (ours_BR, theirs_BR)))


def _summed(part: Pairs, logprobs_BR: Tensor, baseline: Tensor) -> _LogProbs:
    mask_BR = part.batch.mask_BR
    reference = None if part.ref_BR is None else zero_padding(part.ref_BR, mask_BR).sum(-1)
    return _LogProbs(logprobs_BR.sum(-1), reference, mask_BR.sum(-1), part.label_N, baseline)


def _count_right(found: _LogProbs) -> float:
    """Count the pairs whose chosen reply the policy prefers, relative to the reference if there is one."""
    chosen, rejected = found.means
    return float(((chosen > rejected) if found.reference is None else (found.margin > 0)).sum())
