"""Beam search, for collecting replies only: never for reinforcement learning, whose samples come from one distribution."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from selfeval.backbone.budget import Phase
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import reply_logprobs
from selfeval.prompt import Prompt
from selfeval.rollout.engine import check_prompts
from selfeval.rollout.requests import Rollout

__all__ = ["beam_search"]


@torch.no_grad()
def beam_search(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    *,
    beams: int,
    max_new_tokens: int,
    batch_size: int = 256,
    batch_tokens: int = 16384,
) -> list[Rollout]:
    """The most likely reply found by beam search (transformers' `generate`) to each prompt, under the acting role.

    Args:
        prompts: one per reply.
        beams: width of the search.
        max_new_tokens: limit per reply.
        batch_size: number of beams in a batch.
        batch_tokens: tokens per pass when log-probs are taken.

    Returns:
        Rollouts in the order of the prompts, with log-probs at temperature 1.
    """
    backbone.refuse_mixed_rows("beam search")
    check_prompts(backbone, prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))

    def of_group(group: list[int]) -> list[tuple[int, ...]]:
        return _generate(backbone, [prompts[order[i]] for i in group], beams, max_new_tokens)

    replies: dict[int, tuple[int, ...]] = {}
    for group, found in backbone.budget.in_groups(Phase.BEAMS, [beams] * len(order), batch_size, of_group):
        replies.update({order[i]: reply for i, reply in zip(group, found, strict=True)})
    return _with_logprobs(backbone, prompts, [replies[i] for i in range(len(prompts))], batch_tokens)


def _generate(backbone: Backbone, prompts: Sequence[Prompt], beams: int, limit: int) -> list[tuple[int, ...]]:
    loaded, width = backbone.loaded, max(len(p.ids) for p in prompts)
    # All rows are padded to the longest prompt, whose room limits the batch.
    room = (loaded.context_length or sys.maxsize) - width
    ids = torch.tensor([[loaded.pad_id] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=loaded.device)
    attention = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=loaded.device)
    settings = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=min(limit, room),
        pad_token_id=loaded.pad_id,
        eos_token_id=list(loaded.eos_ids) or None,
    )
    with _own_settings(backbone.model):
        out = backbone.model.generate(input_ids=ids, attention_mask=attention, generation_config=settings)
    return [_until_end(row, loaded.eos_ids) for row in out[:, width:].tolist()]


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Hides the model's generation defaults: transformers fills what is unset from them (a repetition penalty, say)."""
    defaults, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _until_end(ids: Sequence[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    # Rows that ended early are padded, possibly with the end token itself: cut at the first one.
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return tuple(ids[: end + 1])


def _with_logprobs(
    backbone: Backbone, prompts: Sequence[Prompt], replies: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[Rollout]:
    # Beam search returns a score per sequence, so the log-probs per token need a forward pass.
    logprobs = reply_logprobs(backbone, prompts, replies, batch_tokens=batch_tokens)
    return [Rollout(ids, p, ids[-1] in backbone.loaded.eos_ids) for ids, p in zip(replies, logprobs, strict=True)]
