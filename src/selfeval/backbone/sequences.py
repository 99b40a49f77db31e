"""Prompts and replies as padded batches, and what the backbone says about their reply tokens.

Shapes: B sequences, T tokens of prompt and reply, R reply tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfeval.algorithms.masked import zero_padding
from selfeval.backbone.budget import Phase
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.shared_prefixes import PrefixLayout, prefix_layout
from selfeval.errors import LoopError, ModelError
from selfeval.prompt import Prompt

_FEWER = 0.9
"""Largest share of the padded tokens at which a layout is read in place of separate rows."""

__all__ = [
    "Sequences",
    "final_scores",
    "owners_of",
    "pad_sequences",
    "prompt_numbers",
    "refuse_images",
    "reply_hidden",
    "reply_logprobs",
    "states_at",
]


@dataclass(frozen=True)
class Sequences:
    """Right-padded sequences: each a prompt followed by its reply.

    Attributes:
        ids_BT: token ids.
        attention_BT: 1 at real tokens.
        prompt_lengths_B: tokens before the reply.
        reply_BR: the reply tokens alone, padded.
        mask_BR: true at real reply tokens.
        owners_B: a number per row; rows with equal numbers have equal prompts.
    """

    ids_BT: Tensor
    attention_BT: Tensor
    prompt_lengths_B: Tensor
    reply_BR: Tensor
    mask_BR: Tensor
    owners_B: Tensor

    @property
    def sizes(self) -> list[int]:
        """Tokens of each prompt with its reply."""
        found: list[int] = self.attention_BT.sum(-1).tolist()
        return found

    def prompt_numbers(self, backbone: Backbone) -> list[int] | None:
        """Return the numbers of the prompts for `MemoryBudget.in_groups`, or None if replies do not share their pass."""
        return self.owners_B.tolist() if backbone.shares_prefixes(self.ids_BT.shape[1]) else None

    def layout_tokens(self, *, last: bool) -> int:
        """Return the number of tokens of `layout`."""
        lengths_B = torch.zeros(len(self.owners_B), dtype=torch.long, device=self.owners_B.device)
        # Rows with the same prompt write the same number.
        lengths_B[self.owners_B.unique(return_inverse=True)[1]] = self.prompt_lengths_B
        return int(lengths_B.sum() + self.mask_BR.sum()) - (0 if last else len(self.owners_B))

    def layout(self, *, last: bool) -> PrefixLayout:
        """Return the tokens in one row, each distinct prompt once.

        Args:
            last: whether the last token of each reply is read; no reply token is predicted from it.
        """
        lengths_B = self.mask_BR.sum(-1) - int(not last)
        return prefix_layout(self.ids_BT, self.prompt_lengths_B, self.reply_BR, lengths_B, self.owners_B)


def prompt_numbers(backbone: Backbone, prompts: Sequence[Prompt], sizes: Sequence[int]) -> list[int] | None:
    """Return the numbers of the prompts for `MemoryBudget.in_groups`, or None if replies do not share its pass.

    Args:
        backbone: where the replies will be passed through.
        prompts: one per reply.
        sizes: tokens of each prompt with its reply.
    """
    return owners_of(prompts) if backbone.shares_prefixes(max(sizes, default=0)) else None


def owners_of(prompts: Sequence[Prompt]) -> list[int]:
    """Number the prompts; equal prompts have equal numbers.

    Example:
        >>> owners_of([Prompt((1, 2)), Prompt((3,)), Prompt((1, 2))])
        [0, 1, 0]
    """
    numbers: dict[Prompt, int] = {}
    return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]


def refuse_images(backbone: Backbone, prompts: Sequence[Prompt]) -> None:
    """Check that no prompt has images, because no supported model family reads them.

    Raises:
        ModelError: a prompt has an image.
    """
    if any(prompt.images for prompt in prompts):
        raise ModelError(
            f"{backbone.base_name}: a prompt contains an image, but models of type {backbone.model.config.model_type} are "
            "supported for text only; use prompts without images"
        )


def pad_sequences(backbone: Backbone, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]]) -> Sequences:
    """Batch prompts and replies.

    Args:
        backbone: where they will be passed through.
        prompts: one per reply.
        replies: b lists of token ids, each of at least one token.

    Raises:
        LoopError: a prompt with its reply is longer than the model's context.
        ModelError: a prompt has an image.
    """
    refuse_images(backbone, prompts)
    pad, device = backbone.loaded.pad_id, backbone.loaded.device
    width, context = max(len(p.ids) + len(r) for p, r in zip(prompts, replies, strict=True)), backbone.loaded.context_length
    if context is not None and width > context:
        raise LoopError(
            f"a prompt and its reply have {width} tokens, more than this model's context of {context}; use shorter "
            "texts (in a run: a lower replies.max_new_tokens or shorter templates) or a model with a longer context"
        )
    longest = max(len(r) for r in replies)
    rows = [[*p.ids, *r] for p, r in zip(prompts, replies, strict=True)]
    return Sequences(
        ids_BT=torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device),
        attention_BT=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
        prompt_lengths_B=torch.tensor([len(p.ids) for p in prompts], device=device),
        reply_BR=torch.tensor([[*r, *[pad] * (longest - len(r))] for r in replies], device=device),
        mask_BR=torch.tensor([[True] * len(r) + [False] * (longest - len(r)) for r in replies], device=device),
        owners_B=torch.tensor(owners_of(prompts), device=device),
    )


def reply_hidden(backbone: Backbone, batch: Sequences) -> Tensor:
    """Hidden states `[B, R, D]` of the acting role *before* each reply token: those that predict it."""
    layout = _layout(backbone, batch, last=False)
    if layout is not None:
        hidden_ND = backbone.layout_hidden(layout)
        return hidden_ND.index_select(0, layout.before_BR.flatten()).view(*layout.before_BR.shape, -1)
    hidden_BTD = backbone.hidden(batch.ids_BT, batch.attention_BT)
    # The state at a token predicts the next one, so the reply starts one state early. Padding may point past the end: it is
    # clamped here, and masked by the caller.
    offsets_R = torch.arange(batch.reply_BR.shape[1], device=hidden_BTD.device)
    index_BR = (batch.prompt_lengths_B[:, None] - 1 + offsets_R).clamp_max(hidden_BTD.shape[1] - 1)
    return hidden_BTD.gather(1, index_BR[..., None].expand(-1, -1, hidden_BTD.shape[-1]))


def states_at(backbone: Backbone, batch: Sequences, rows_S: Tensor, tokens_S: Tensor) -> Tensor:
    """Hidden states `[S, D]` of the acting role at some reply tokens.

    Args:
        rows_S: row of each token.
        tokens_S: its index in the reply, from 0.
    """
    layout = _layout(backbone, batch, last=True)
    if layout is not None:
        return backbone.layout_hidden_at(layout, layout.replies_BR[rows_S, tokens_S])
    return backbone.hidden_at(batch.ids_BT, batch.attention_BT, rows_S, batch.prompt_lengths_B[rows_S] + tokens_S)


def final_scores(backbone: Backbone, role: str, batch: Sequences) -> Tensor:
    """Apply the scalar head of `role` (which must be acting) to one state per sequence, `[B]`.

    It is the state at the last token, or with the pooling `mean` of the role the mean of those at the tokens of the reply.
    """
    layout = _layout(backbone, batch, last=True)
    if layout is not None:
        return _layout_scores(backbone, role, batch, layout)
    if backbone.roles.poolings.get(role) == "mean":
        return _mean_scores(backbone.score(role, backbone.hidden(batch.ids_BT, batch.attention_BT)), batch)
    # Right-padded, so the number of real tokens is one more than the last one's position.
    last_B = batch.attention_BT.sum(-1) - 1
    rows_B = torch.arange(len(last_B), device=last_B.device)
    return backbone.score(role, backbone.hidden_at(batch.ids_BT, batch.attention_BT, rows_B, last_B))


def _layout(backbone: Backbone, batch: Sequences, *, last: bool) -> PrefixLayout | None:
    """Return the layout of a batch whose prompts are read once, or None if separate rows are as good or the only way."""
    if not backbone.shares_prefixes(batch.ids_BT.shape[1]) or batch.layout_tokens(last=last) > _FEWER * batch.ids_BT.numel():
        return None
    return batch.layout(last=last)


def _layout_scores(backbone: Backbone, role: str, batch: Sequences, layout: PrefixLayout) -> Tensor:
    """Return the scores `[B]` of a batch from its layout."""
    lengths_B = batch.mask_BR.sum(-1)
    if backbone.roles.poolings.get(role) == "mean":
        scores_BR = backbone.score(role, backbone.layout_hidden(layout))[layout.replies_BR]
        return zero_padding(scores_BR, batch.mask_BR[:, : scores_BR.shape[1]]).sum(-1) / lengths_B
    last_B = layout.replies_BR.gather(1, lengths_B[:, None] - 1)[:, 0]
    return backbone.score(role, backbone.layout_hidden_at(layout, last_B))


def _mean_scores(scores_BT: Tensor, batch: Sequences) -> Tensor:
    """Return the mean over the tokens of each reply, `[B]`. The head is linear, so this is its output on the mean state."""
    positions_T = torch.arange(scores_BT.shape[1], device=scores_BT.device)
    reply_BT = batch.attention_BT.bool() & (positions_T >= batch.prompt_lengths_B[:, None])
    return zero_padding(scores_BT, reply_BT).sum(-1) / reply_BT.sum(-1)


@torch.no_grad()
def reply_logprobs(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    replies: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    temperature: float | Sequence[float] = 1.0,
) -> list[tuple[float, ...]]:
    """Log-probs at `temperature` of every reply token under the acting role, in nats, in the order given.

    Args:
        backbone: backbone with an acting role.
        prompts: one per reply.
        replies: token ids of the replies.
        batch_tokens: maximum tokens of a micro-batch.
        temperature: Optional. Temperature of all replies, or of each, > 0. Default: 1.
    """
    temperatures = [temperature] * len(replies) if isinstance(temperature, int | float) else temperature

    def logprobs(group: list[int]) -> list[list[float]]:
        batch = pad_sequences(backbone, [prompts[i] for i in group], [replies[i] for i in group])
        hidden_BRD, found = reply_hidden(backbone, batch), dict[int, list[float]]()
        same: dict[float, list[int]] = {}
        for row, i in enumerate(group):
            same.setdefault(temperatures[i], []).append(row)
        for each, rows in same.items():
            # Not copied if all have the same.
            of = slice(None) if len(same) == 1 else rows
            part = token_logprobs(backbone, hidden_BRD[of], batch.reply_BR[of], batch.mask_BR[of], temperature=each)
            found.update(zip(rows, part.logprobs.tolist(), strict=True))
        return [found[row] for row in range(len(group))]

    backbone.refuse_mixed_rows("scoring in groups of similar length")
    found: dict[int, tuple[float, ...]] = {}
    sizes = [len(p.ids) + len(r) for p, r in zip(prompts, replies, strict=True)]
    grouped = prompt_numbers(backbone, prompts, sizes)
    for group, rows in backbone.budget.in_groups(Phase.SCORE, sizes, batch_tokens, logprobs, grouped):
        found.update({i: tuple(row[: len(replies[i])]) for i, row in zip(group, rows, strict=True)})
    return [found[i] for i in range(len(replies))]
