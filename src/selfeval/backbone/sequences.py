"""Prompts and replies as padded batches, and what the backbone says about their reply tokens.

Shapes: B sequences, T tokens of prompt and reply, R reply tokens, N tokens in a row, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from selfeval.backbone.budget import Phase
from selfeval.backbone.roles import Backbone
from selfeval.errors import LoopError

__all__ = ["Sequences", "final_scores", "pad_sequences", "reply_hidden", "reply_logprobs", "token_logprobs"]

_CHUNK_ELEMENTS = 1 << 23
"""Logits held at once when the log-probs of many tokens are taken (32 MiB in fp32)."""


@dataclass(frozen=True)
class Sequences:
    """Right-padded sequences: each a prompt followed by its reply.

    Attributes:
        ids_BT: token ids.
        attention_BT: 1 at real tokens.
        prompt_lengths_B: tokens before the reply.
        reply_BR: the reply tokens alone, padded.
        mask_BR: True at real reply tokens.
    """

    ids_BT: Tensor
    attention_BT: Tensor
    prompt_lengths_B: Tensor
    reply_BR: Tensor
    mask_BR: Tensor


def pad_sequences(backbone: Backbone, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> Sequences:
    """Batches prompts and replies.

    Args:
        backbone: where they will be passed through.
        prompts: B lists of token ids.
        replies: B lists of token ids, each of at least one token.

    Raises:
        LoopError: a prompt with its reply is longer than the model's context.
    """
    pad, device = backbone.loaded.pad_id, backbone.loaded.device
    width, context = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True)), backbone.loaded.context_length
    if context is not None and width > context:
        raise LoopError(
            f"a prompt and its reply have {width} tokens, more than this model's context of {context}; lower "
            "replies.max_new_tokens or use shorter templates"
        )
    longest = max(len(r) for r in replies)
    rows = [[*p, *r] for p, r in zip(prompts, replies, strict=True)]
    return Sequences(
        ids_BT=torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device),
        attention_BT=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
        prompt_lengths_B=torch.tensor([len(p) for p in prompts], device=device),
        reply_BR=torch.tensor([[*r, *[pad] * (longest - len(r))] for r in replies], device=device),
        mask_BR=torch.tensor([[True] * len(r) + [False] * (longest - len(r)) for r in replies], device=device),
    )


def reply_hidden(backbone: Backbone, batch: Sequences) -> Tensor:
    """Hidden states `[B, R, D]` of the acting role *before* each reply token: those that predict it."""
    hidden_BTD = backbone.hidden(batch.ids_BT, batch.attention_BT)
    offsets_R = torch.arange(batch.reply_BR.shape[1], device=hidden_BTD.device)
    index_BR = (batch.prompt_lengths_B[:, None] - 1 + offsets_R).clamp_max(hidden_BTD.shape[1] - 1)
    return hidden_BTD.gather(1, index_BR[..., None].expand(-1, -1, hidden_BTD.shape[-1]))


def final_scores(backbone: Backbone, role: str, batch: Sequences) -> Tensor:
    """The scalar head of `role` (which must be acting) on the last token of each sequence, `[B]`."""
    hidden_BTD = backbone.hidden(batch.ids_BT, batch.attention_BT)
    last_B = batch.attention_BT.sum(-1) - 1
    return backbone.score(role, hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B])


def _chunk_logprobs(backbone: Backbone, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs_NV = torch.log_softmax(backbone.logits(hidden_ND) / temperature, dim=-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


def token_logprobs(
    backbone: Backbone, hidden_BRD: Tensor, targets_BR: Tensor, mask_BR: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs of the reply tokens and entropies of their distributions, without holding all logits at once.

    Args:
        backbone: whose output layer is used (frozen).
        hidden_BRD: states that predict each token.
        targets_BR: the tokens.
        mask_BR: True at the tokens that count; the others cost nothing and give 0.
        temperature: of the distribution whose log-probs are taken.

    Returns:
        logprobs_BR, entropy_BR in nats.
    """
    hidden_ND, targets_N = hidden_BRD[mask_BR], targets_BR[mask_BR]
    vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
    size = max(1, _CHUNK_ELEMENTS // vocabulary)
    parts = []
    for h, t in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        if len(hidden_ND) > size and h.requires_grad:
            parts.append(checkpoint(_chunk_logprobs, backbone, h, t, temperature, use_reentrant=False))
        else:
            parts.append(_chunk_logprobs(backbone, h, t, temperature))
    logprobs_BR = hidden_BRD.new_zeros(mask_BR.shape, dtype=torch.float32)
    entropy_BR = torch.zeros_like(logprobs_BR)
    logprobs_BR = logprobs_BR.masked_scatter(mask_BR, torch.cat([p[0] for p in parts]))
    return logprobs_BR, entropy_BR.masked_scatter(mask_BR, torch.cat([p[1] for p in parts]))


@torch.no_grad()
def reply_logprobs(
    backbone: Backbone, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], *, batch_tokens: int
) -> list[tuple[float, ...]]:
    """Log-probs at temperature 1 of every reply token under the acting role, in nats, in the order given."""

    def logprobs(group: list[int]) -> list[list[float]]:
        batch = pad_sequences(backbone, [prompts[i] for i in group], [replies[i] for i in group])
        rows: list[list[float]] = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)[
            0
        ].tolist()
        return rows

    found: dict[int, tuple[float, ...]] = {}
    sizes = [len(p) + len(r) for p, r in zip(prompts, replies, strict=True)]
    for group, rows in backbone.budget.in_groups(Phase.SCORE, sizes, batch_tokens, logprobs):
        found.update({i: tuple(row[: len(replies[i])]) for i, row in zip(group, rows, strict=True)})
    return [found[i] for i in range(len(replies))]
