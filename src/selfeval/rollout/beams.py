"""Beam search, for collecting replies only: never for reinforcement learning, whose samples come from one distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import microbatches, pad_sequences, reply_hidden, token_logprobs
from selfeval.rollout.engine import Rollout

__all__ = ["beam_search"]


@torch.no_grad()
def beam_search(
    backbone: Backbone,
    prompts: Sequence[tuple[int, ...]],
    *,
    beams: int,
    max_new_tokens: int,
    rows: int = 256,
    batch_tokens: int = 16384,
) -> list[Rollout]:
    """The most likely reply found by beam search (transformers' `generate`) to each prompt, under the acting role.

    Args:
        prompts: token ids.
        beams: width of the search.
        max_new_tokens: limit per reply.
        rows: beams side by side.
        batch_tokens: tokens per pass when log-probs are taken.

    Returns:
        Rollouts in the order of the prompts, with log-probs at temperature 1.
    """
    results: dict[int, Rollout] = {}
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    prompts_at_once = max(1, rows // beams)
    for start in range(0, len(order), prompts_at_once):
        group = order[start : start + prompts_at_once]
        replies = _generate(backbone, [prompts[i] for i in group], beams, max_new_tokens)
        found = _with_logprobs(backbone, [prompts[i] for i in group], replies, batch_tokens)
        results.update(zip(group, found, strict=True))
    return [results[i] for i in range(len(prompts))]


def _generate(backbone: Backbone, prompts: Sequence[tuple[int, ...]], beams: int, limit: int) -> list[tuple[int, ...]]:
    loaded, width = backbone.loaded, max(len(p) for p in prompts)
    ids = torch.tensor([[loaded.pad_id] * (width - len(p)) + list(p) for p in prompts], device=loaded.device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.device)
    out = backbone.model.generate(
        input_ids=ids,
        attention_mask=attention,
        generation_config=GenerationConfig(  # of its own: a model's defaults (repetition penalty, ...) are not ours
            num_beams=beams,
            do_sample=False,
            max_new_tokens=limit,
            pad_token_id=loaded.pad_id,
            eos_token_id=list(loaded.eos_ids) or None,
        ),
    )
    return [_until_end(row, loaded.eos_ids) for row in out[:, width:].tolist()]


def _until_end(ids: Sequence[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return tuple(ids[: end + 1])


def _with_logprobs(
    backbone: Backbone, prompts: Sequence[tuple[int, ...]], replies: Sequence[tuple[int, ...]], batch_tokens: int
) -> list[Rollout]:
    rollouts: dict[int, Rollout] = {}
    for group in microbatches([len(p) + len(r) for p, r in zip(prompts, replies, strict=True)], batch_tokens):
        batch = pad_sequences(backbone, [prompts[i] for i in group], [replies[i] for i in group])
        logprobs_BR, _ = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
        for index, row in zip(group, logprobs_BR.tolist(), strict=True):
            ids = replies[index]
            finished = ids[-1] in backbone.loaded.eos_ids
            rollouts[index] = Rollout(ids, tuple(row[: len(ids)]), finished)
    return [rollouts[i] for i in range(len(replies))]
