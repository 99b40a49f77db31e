"""Log-probs of certain tokens right after prompts, without sampling; what prompts have in common at their start is read once.

Prompts of a judge share its instructions, and often the question. Those of a group are split into a shared start and the rest,
which are read in the layout of replies that share a prompt (`backbone.shared_prefixes`).

Shapes: B prompts, D hidden, W watched tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from selfeval.backbone.budget import Phase, prompt_pass_tokens
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import Sequences, pad_sequences, states_at
from selfeval.prompt import Prompt
from selfeval.rollout.engine import add_to_tally
from selfeval.rollout.requests import Request, Rollout

__all__ = ["last_logprobs", "next_logprobs", "shared_starts"]

_FEWER = 0.7
"""Share of the tokens at which shared starts are read once. Attention in two parts has an additional cost: for the embedded
model, a fifth fewer tokens took as long as separate rows."""


def next_logprobs(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    watch: Sequence[int],
    *,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Return log-probs in nats of tokens right after each prompt, under the acting role at temperature 1, in the order given.

    They are those that `generate` records for `watch` at its first step, up to rounding.

    Args:
        backbone: backbone with an acting role.
        prompts: prompts of at least two tokens.
        watch: token ids.
        batch_size: maximum number of prompts in memory at once.
        advance: Optional. Called with the number of prompts that were just read.

    Raises:
        LoopError: a prompt is longer than the model's context.
        ModelError: a prompt has an image.
        MemoryLimitError: there is not enough memory for a single prompt.
    """
    backbone.refuse_mixed_rows("reading label probabilities in groups of similar length")
    columns = torch.tensor(list(watch), dtype=torch.long, device=backbone.loaded.device)

    @torch.no_grad()
    def of_group(group: list[int]) -> list[list[float]]:
        # In the order of their ids, prompts with the same start are next to each other.
        order = sorted(range(len(group)), key=lambda place: prompts[group[place]].ids)
        chosen = [prompts[group[place]] for place in order]
        ids = [prompt.ids for prompt in chosen]
        starts = shared_starts(ids)
        if _tokens(ids, starts) > _FEWER * sum(map(len, ids)):
            starts = [len(row) - 1 for row in ids]
        split = list(zip(chosen, starts, strict=True))
        firsts, rests = [Prompt(p.ids[:start], p.images) for p, start in split], [p.ids[start:] for p, start in split]
        logprobs_BW = last_logprobs(backbone, pad_sequences(backbone, firsts, rests), columns)
        found = dict(zip(order, logprobs_BW.tolist(), strict=True))
        return [found[place] for place in range(len(group))]

    sizes = [len(prompt.ids) for prompt in prompts]
    # Counted before shared starts are taken out.
    limit = min(prompt_pass_tokens(backbone.loaded.device.type), batch_size * max(sizes, default=0))
    results: dict[int, tuple[float, ...]] = {}
    for group, rows in backbone.budget.in_groups(Phase.SCORE, sizes, limit, of_group):
        results |= {i: tuple(row) for i, row in zip(group, rows, strict=True)}
        if advance:
            advance(len(group))
    # The tokens that were asked to be read, as in sampling: shared starts are not subtracted.
    add_to_tally([Request(prompt) for prompt in prompts], [Rollout((), (), False)] * len(prompts))
    return [results[i] for i in range(len(prompts))]


def last_logprobs(backbone: Backbone, batch: Sequences, watch_W: Tensor) -> Tensor:
    """Return log-probs `[B, W]` of tokens right after the last token of each sequence, under the acting role."""
    rows_B = torch.arange(len(batch.ids_BT), device=batch.ids_BT.device)
    logprobs_BV = backbone.logits(states_at(backbone, batch, rows_B, batch.mask_BR.sum(-1) - 1)).log_softmax(-1)
    return logprobs_BV[:, watch_W.to(logprobs_BV.device)]


def shared_starts(sorted_ids: Sequence[Sequence[int]]) -> list[int]:
    """Return for each of some sorted sequences the number of its first tokens to read once for it and its neighbours.

    Neighbours are in one cluster where they share at least a certain number of tokens, and a cluster reads once what all of its
    members share, without the last token of any. Of all such numbers the one with the fewest tokens in total is chosen.

    Example:
        >>> shared_starts([(1, 2, 3, 4), (1, 2, 3, 5), (1, 7, 7, 7)])
        [3, 3, 3]
    """
    shared = [_common(a, b) for a, b in pairwise(sorted_ids)]
    candidates = [_starts(sorted_ids, shared, least) for least in {*shared, 0}]
    return min(candidates, key=lambda starts: _tokens(sorted_ids, starts))


def _starts(sorted_ids: Sequence[Sequence[int]], shared: Sequence[int], least: int) -> list[int]:
    """Return the starts if neighbours with at least `least` shared tokens are in one cluster."""
    clusters, commons = [[0]], [len(sorted_ids[0])]
    for place, common in enumerate(shared, start=1):
        if common >= least:
            clusters[-1].append(place)
            # In sorted order, all members share what each of them shares with the next.
            commons[-1] = min(commons[-1], common)
        else:
            clusters.append([place])
            commons.append(len(sorted_ids[place]))
    starts = []
    for cluster, common in zip(clusters, commons, strict=True):
        # A prompt needs a token that is not shared, and one before it.
        start = max(1, min(common, *(len(sorted_ids[place]) - 1 for place in cluster)))
        starts += [start] * len(cluster)
    return starts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of first tokens that two sequences share, by bisection: slices are compared in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tokens(sorted_ids: Sequence[Sequence[int]], starts: Sequence[int]) -> int:
    """Return the number of tokens that are read: each distinct start once, and all rests."""
    distinct = {(start, tuple(ids[:start])) for ids, start in zip(sorted_ids, starts, strict=True)}
    return sum(start for start, _ in distinct) + sum(len(ids) - start for ids, start in zip(sorted_ids, starts, strict=True))
