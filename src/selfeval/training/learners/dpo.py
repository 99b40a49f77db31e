"""DPO and related preference losses: the policy learns from pairs of replies, without a critic and without clipping.

Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; online, on freshly sampled pairs: Guo et al. 2024,
https://arxiv.org/abs/2402.04792. By default the best and the worst reply to each question form a pair, labelled with the
Bradley-Terry probability of their rewards; its optimum is the KL-regularised policy pi_ref exp(R / beta) / Z. `beta` defaults
to the KL coefficient of the loop.

With `policy.dpo.pairs = "kept"` it trains on the pairs labelled by the judge, and samples replies for the metrics only.
`policy.dpo.loss` selects the loss of a pair, one of the functions in algorithms/preference_losses.py. SimPO and ORPO are
reference-free, so the reference log-probs of kept pairs are not computed for them.

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
from selfeval.training.learners.learner import Learner, Peak
from selfeval.training.policy_updates import Optimizers, learning_rate_factor, mean_of
from selfeval.training.preference_pairs import Pairs, best_and_worst, kept_pairs, mismatched
from selfeval.training.schedules import draw

__all__ = ["DPO"]

_LEAST = -1e-6
"""Upper bound on the mean log-prob per token in ORPO: at 0 the odds are infinite."""


@dataclass(frozen=True)
class _LogProbs:
    """Inputs of the losses: log-probs of whole replies, in the order of `Pairs`.

    Attributes:
        policy: log-probs summed over tokens, [2N].
        reference: Optional. The same under the reference; None for reference-free losses.
        lengths: tokens of each reply, [2N].
        label: probability that the chosen reply is better, [N].
        baseline: KTO's reference point, a scalar.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    label: Tensor
    baseline: Tensor

    @property
    def margin(self) -> Tensor:
        """Log-ratio margin of chosen over rejected replies, policy minus reference, [N]."""
        return dpo_margin(*self.policy.chunk(2), *present(self.reference).chunk(2))

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean log-prob per token of chosen and of rejected replies, [N] each."""
        chosen, rejected = (self.policy / self.lengths).chunk(2)
        return chosen, rejected


def _sigmoid(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    return dpo_loss(found.margin, _smoothed(found.label, settings.label_smoothing), beta=beta)


def _ipo(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    return ipo_loss(found.margin, beta=beta)


def _robust(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    return robust_dpo_loss(found.margin, beta=beta, flip_rate=settings.flip_rate)


def _kto(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    """Treat chosen replies as desirable and rejected replies as undesirable, and average the two losses of each pair."""
    good = torch.ones_like(found.policy, dtype=torch.bool)
    good[len(found.label) :] = False
    # The flags follow the order of the rows: all chosen replies, then all rejected ones.
    chosen, rejected = kto_loss(found.policy, present(found.reference), good, found.baseline, beta=beta).chunk(2)
    return (chosen + rejected) / 2


def _simpo(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    label = _smoothed(found.label, settings.label_smoothing)
    return simpo_loss(*found.means, label, beta=beta, gamma=settings.simpo_gamma)


def _orpo(found: _LogProbs, settings: DPOConfig, beta: float) -> Tensor:
    chosen, rejected = (mean.clamp(max=_LEAST) for mean in found.means)
    # The third argument is the next-token loss of the chosen reply: ORPO is fine-tuning plus an odds-ratio penalty.
    return orpo_loss(chosen, rejected, -chosen, beta=beta)


def _smoothed(label: Tensor, share: float) -> Tensor:
    # (1 - share) label + share (1 - label): smoothing a soft label moves it towards its opposite.
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
        """Return the pairs of an iteration: sampled pairs, or the next ones of the kept pairs, reshuffled in every pass."""
        context, with_reference = self.context, self.settings.has_reference
        if not self.settings.reads_kept_pairs:
            return best_and_worst(experience, with_reference=with_reference)
        # As many rows as replies were sampled.
        count = len(experience.scores_B) // 2
        picked = draw(len(context.pairs), iteration - 1, count, f"{context.seed}/kept")
        return kept_pairs(context, [context.pairs[i] for i in picked], with_reference=with_reference)

    def _minibatches(self, pairs: Pairs, iteration: int) -> Iterator[Pairs]:
        config = self.context.config
        for epoch in range(config.epochs):
            order = list(range(len(pairs.label_N)))
            random.Random(f"{self.context.seed}/pairs/{iteration}/{epoch}").shuffle(order)
            # `minibatch` counts replies, and a pair has two; the configuration requires at least 2.
            for start in range(0, len(order), config.minibatch // 2):
                yield pairs.some(torch.tensor(order[start : start + config.minibatch // 2], device=pairs.label_N.device))

    def _gradients(self, pairs: Pairs, beta: float) -> dict[str, float]:
        """Accumulate the gradient of the mean loss of a minibatch and return metrics averaged over its pairs."""
        context, count = self.context, len(pairs.label_N)
        parameters, baseline = list(context.backbone.roles.parameters(POLICY).values()), self._baseline(pairs)

        def of_group(group: list[int]) -> tuple[float, float, float]:
            part = pairs.some(torch.tensor(group, device=pairs.label_N.device))
            summed, found, entropy = self._loss(part, baseline, beta)
            values = summed.item(), _count_right(found), float(masked_sum(entropy.detach(), part.batch.mask_BR))
            # Last, because a group that runs out of memory is repeated.
            add_gradients(summed / count, parameters)
            return values

        sizes = pairs.batch.attention_BT.sum(-1)
        # A pair is two rows, padded to the longer of them; they are never separated.
        together = (2 * torch.maximum(sizes[:count], sizes[count:])).tolist()
        with context.backbone.acting_as(POLICY):
            groups = context.backbone.budget.in_groups(Phase.UPDATE, together, context.batch_tokens, of_group)
            loss, right, entropy = (sum(column) for column in zip(*(found for _, found in groups), strict=True))
        tokens = int(pairs.batch.mask_BR.sum())
        return {"policy_loss": loss / count, "pair_accuracy": right / count, "entropy": entropy / tokens}

    def _loss(self, part: Pairs, baseline: Tensor, beta: float) -> tuple[Tensor, _LogProbs, Tensor]:
        """Compute the summed loss of a micro-batch, the log-probs behind it, and the entropies `[2N, R]`."""
        found = policy_logprobs(self.context.backbone, part.batch, self.context.config.temperature)
        whole = _summed(part, found.logprobs, baseline)
        return _LOSSES[self.settings.loss](whole, self.settings, beta).sum(), whole, present(found.entropy)

    def update_peaks(self, replies: int) -> Sequence[Peak]:
        config = self.context.config
        paired = replies if self.settings.reads_kept_pairs else min(replies, 2 * config.questions_per_iteration)
        return [Peak(POLICY, self._planned_loss, min(config.minibatch, paired), in_pairs=True)]

    def _planned_loss(self, rows: Experience) -> Tensor:
        """Compute the loss of the first half of the rows against the second half."""
        # Any numbers serve as labels, because the planner measures memory and ignores the value.
        label_N = rows.scores_B[: len(rows.scores_B) // 2]
        reference = rows.ref_logprobs if self.settings.has_reference else None
        loss, _, _ = self._loss(Pairs(rows.policy_batch, label_N, reference), torch.zeros(()), beta=1.0)
        return loss

    def _baseline(self, pairs: Pairs) -> Tensor:
        """Estimate KTO's reference point over the minibatch; 0 for other losses, and if there is only one question."""
        context, zero = self.context, torch.zeros((), device=pairs.label_N.device)
        others = mismatched(context, pairs.batch) if self.settings.loss == "kto" else None
        if others is None:
            return zero
        backbone, temperature = context.backbone, context.config.temperature
        with backbone.acting_as(POLICY):
            # No gradient flows through the reference point (Ethayarajh et al. 2024, section 4).
            ours_BR = over_microbatches(context, others, lambda part: policy_logprobs(backbone, part, temperature).logprobs)
        theirs_BR = reference_logprobs(context, others)
        return kto_baseline(*(zero_padding(x_BR, others.mask_BR).sum(-1) for x_BR in (ours_BR, theirs_BR)))


def _summed(part: Pairs, logprobs_BR: Tensor, baseline: Tensor) -> _LogProbs:
    mask_BR = part.batch.mask_BR
    reference = None if part.ref_BR is None else zero_padding(part.ref_BR, mask_BR).sum(-1)
    return _LogProbs(logprobs_BR.sum(-1), reference, mask_BR.sum(-1), part.label_N, baseline)


def _count_right(found: _LogProbs) -> float:
    """Count the pairs in which the policy prefers the chosen reply, relative to the reference if there is one."""
    chosen, rejected = found.means
    return float(((chosen > rejected) if found.reference is None else (found.margin > 0)).sum())
