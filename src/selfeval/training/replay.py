"""The replay buffer of the value learners: replies of past iterations with their rewards.

Lin 1992, https://doi.org/10.1007/BF00992699; Mnih et al. 2015, methods, https://doi.org/10.1038/nature14236.

Shapes: B replies, R reply tokens, N replies in the buffer.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, pad_sequences
from selfeval.prompt import Prompt
from selfeval.training.experience import Experience, rows_of

__all__ = ["Replay", "Replayed", "replayed"]


@dataclass(frozen=True)
class Replayed:
    """A batch of replayed replies; all tensors except the two batches are `[B, R]`.

    Attributes:
        policy_batch, critic_batch: the same replies after the reply prompt and after the grade prompt.
        rewards: reward of each token, without a KL penalty.
        logprobs: log-probs of the tokens under the policy that sampled them.
        ref_logprobs: log-probs of the tokens under the reference.
        taken: Q of each token by the target networks. Default: 0, until the learner has computed it.
        targets: target of the value functions at each token. Default: 0, until the learner has computed them.
        weights: weight of each token in the loss. Default: 1.
    """

    policy_batch: Sequences
    critic_batch: Sequences
    rewards: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    taken: Tensor
    targets: Tensor
    weights: Tensor

    @property
    def mask(self) -> Tensor:
        return self.policy_batch.mask_BR

    def rows(self, index: Tensor) -> Replayed:
        """Return the replies at these indices."""
        per_token = (self.rewards, self.logprobs, self.ref_logprobs, self.taken, self.targets, self.weights)
        batches = rows_of(self.policy_batch, index), rows_of(self.critic_batch, index)
        return Replayed(*batches, *(part[index] for part in per_token))


def replayed(experience: Experience) -> Replayed:
    """Return an iteration's replies as if they had been replayed, with targets of 0 and weights of 1."""
    nothing = torch.zeros_like(experience.logprobs)
    return Replayed(
        experience.policy_batch,
        experience.critic_batch,
        rewards=experience.rewards,
        logprobs=experience.logprobs,
        ref_logprobs=experience.ref_logprobs,
        taken=nothing,
        targets=nothing,
        weights=torch.ones_like(nothing),
    )


class _Row(NamedTuple):
    """One reply on the CPU: token ids of prompt, grade prompt and reply, then per-token tensors as in `Replayed`."""

    prompt: Tensor
    grade: Tensor
    reply: Tensor
    rewards: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor


class Replay:
    """A first-in, first-out buffer of replies.

    Args:
        capacity: maximum number of replies; the oldest are dropped first.
    """

    def __init__(self, capacity: int) -> None:
        self.rows: deque[_Row] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, experience: Experience) -> None:
        """Add an iteration's replies."""
        policy, critic, mask = experience.policy_batch, experience.critic_batch, experience.mask
        for row in range(len(mask)):
            kept = mask[row]
            parts = (
                policy.ids_BT[row, : policy.prompt_lengths_B[row]],
                critic.ids_BT[row, : critic.prompt_lengths_B[row]],
                policy.reply_BR[row, kept],
                experience.rewards[row, kept],
                experience.logprobs[row, kept],
                experience.ref_logprobs[row, kept],
            )
            # Cloned, because a view would keep the tensors of the whole iteration in memory.
            self.rows.append(_Row(*(part.cpu().clone() for part in parts)))

    def sample(self, backbone: Backbone, count: int, rng: random.Random) -> Replayed:
        """Sample `count` distinct replies uniformly, or all if there are fewer."""
        rows = rng.sample(self.rows, min(count, len(self.rows)))
        replies = [row.reply.tolist() for row in rows]
        batch = pad_sequences(backbone, [Prompt(tuple(row.prompt.tolist())) for row in rows], replies)
        critic_batch = pad_sequences(backbone, [Prompt(tuple(row.grade.tolist())) for row in rows], replies)
        nothing = torch.zeros(batch.mask_BR.shape, device=batch.mask_BR.device)

        def spread(per_row: Sequence[Tensor]) -> Tensor:
            # Fills the mask row by row: the concatenated replies, without padding, are in that order.
            return nothing.masked_scatter(batch.mask_BR, torch.cat(list(per_row)).to(nothing))

        return Replayed(
            batch,
            critic_batch,
            rewards=spread([row.rewards for row in rows]),
            logprobs=spread([row.logprobs for row in rows]),
            ref_logprobs=spread([row.ref_logprobs for row in rows]),
            taken=nothing,
            targets=nothing,
            weights=torch.ones_like(nothing),
        )

    def state(self) -> dict[str, Tensor]:
        """Return the buffer as one flat tensor per field, with the lengths of the rows."""
        # Ragged rows as flat tensors, because safetensors stores no nested data. An empty buffer has no columns to zip.
        columns = list(zip(*self.rows, strict=True)) or [()] * len(_Row._fields)
        empty = {name: torch.zeros(0, dtype=torch.int64 if i < 3 else torch.float32) for i, name in enumerate(_Row._fields)}
        # The empty tensor comes first: it fixes the dtype, and `cat` refuses an empty list.
        flat = {name: torch.cat([empty[name], *parts]) for name, parts in zip(_Row._fields, columns, strict=True)}
        lengths = [[len(part) for part in row] for row in self.rows]
        return {**flat, "lengths": torch.tensor(lengths, dtype=torch.int64).view(-1, len(_Row._fields))}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace the contents of the buffer with `state`."""
        lengths = state["lengths"].tolist()
        columns = [state[name].split([row[i] for row in lengths]) for i, name in enumerate(_Row._fields)]
        self.rows.clear()
        # Cloned, because `split` returns views: one remaining row would keep all of the loaded buffer in memory.
        self.rows.extend(_Row(*(part.clone() for part in row)) for row in zip(*columns, strict=True))
