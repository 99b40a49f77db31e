"""Pairs of replies as batches for the preference learners.

Shapes: N pairs, 2N rows (all chosen, then all rejected), R reply tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfeval.algorithms.masked import zero_padding
from selfeval.backbone.sequences import Sequences, pad_sequences
from selfeval.prompt import Prompt
from selfeval.training.context import LearnerContext
from selfeval.training.evaluator import Preference
from selfeval.training.experience import Experience, reference_logprobs, rows_of

__all__ = ["Pairs", "best_and_worst", "kept_pairs", "mismatched"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of replies: rows 0 .. N-1 are chosen, N .. 2N-1 rejected.

    Attributes:
        batch: the 2N replies after their prompts.
        label_N: probability that the chosen reply is better.
        ref_BR: Optional. Reference log-probs of the 2N replies; None for losses without a reference.
    """

    batch: Sequences
    label_N: Tensor
    ref_BR: Tensor | None = None

    def some(self, index_N: Tensor) -> Pairs:
        """Return the pairs at these indices."""
        # The pair i is in the rows i and N + i.
        rows = torch.cat([index_N, index_N + len(self.label_N)])
        return Pairs(rows_of(self.batch, rows), self.label_N[index_N], None if self.ref_BR is None else self.ref_BR[rows])


def kept_pairs(context: LearnerContext, picked: Sequence[Preference], *, with_reference: bool) -> Pairs:
    """Build a batch from pairs labelled by the judge.

    Args:
        context: shared context of policy learning.
        picked: the pairs.
        with_reference: whether to compute the reference log-probs.
    """
    replies = [p.chosen for p in picked] + [p.rejected for p in picked]
    batch = pad_sequences(context.backbone, [p.prompt for p in picked] * 2, replies)
    label_N = torch.tensor([p.label for p in picked], device=batch.mask_BR.device)
    return Pairs(batch, label_N, reference_logprobs(context, batch) if with_reference else None)


def best_and_worst(experience: Experience, *, with_reference: bool) -> Pairs:
    """Pair the replies with the highest and the lowest reward of each question, without the KL penalty.

    The label is the Bradley-Terry probability of the two rewards. The penalty is removed from the rewards because the loss has
    its own KL regularisation.

    Args:
        experience: replies with their rewards.
        with_reference: whether the pairs have reference log-probs.
    """
    # The penalty was subtracted with the estimate k1, so adding it with the same estimate cancels it exactly.
    kl_BR = zero_padding(experience.logprobs - experience.ref_logprobs, experience.mask)
    rewards_B = experience.rewards.sum(-1) + experience.kl_coefficient * kl_BR.sum(-1)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(experience.groups_B.tolist()):
        members.setdefault(group, []).append(row)
    rewards = rewards_B.tolist()
    best = [max(rows, key=lambda row: rewards[row]) for rows in members.values()]
    # Reversed, so that equal rewards form a pair of two different replies instead of one reply and itself.
    worst = [min(reversed(rows), key=lambda row: rewards[row]) for rows in members.values()]
    rows_B = torch.tensor([*best, *worst], device=rewards_B.device)
    chosen_N, rejected_N = rewards_B[rows_B].chunk(2)
    ref_BR = experience.ref_logprobs[rows_B] if with_reference else None
    return Pairs(rows_of(experience.policy_batch, rows_B), (chosen_N - rejected_N).sigmoid(), ref_BR)


def mismatched(context: LearnerContext, batch: Sequences) -> Sequences | None:
    """Put each reply after the next different prompt in the batch, for KTO's baseline; None if all prompts are equal."""
    lengths = batch.prompt_lengths_B.tolist()
    prompts = [Prompt(tuple(ids[:n])) for ids, n in zip(batch.ids_BT.tolist(), lengths, strict=True)]
    replies = [ids[kept].tolist() for ids, kept in zip(batch.reply_BR, batch.mask_BR, strict=True)]
    if len(set(prompts)) < 2:
        return None
    others = []
    for row, prompt in enumerate(prompts):
        following = (*prompts[row + 1 :], *prompts[:row])
        others.append(next(other for other in following if other != prompt))
    return pad_sequences(context.backbone, others, replies)
