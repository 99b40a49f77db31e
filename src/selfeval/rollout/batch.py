"""A batch of replies while they are sampled. Rows that end leave it, and waiting requests take their places.

Rows share the columns of the cache: the last column holds the last token of every row, with padding on the left of shorter
rows. A new row is therefore a prompt whose last token is in the last column. Columns that are padding in all rows are dropped.

With a guide, value functions modify the distribution of the acting role. Their roles read the same tokens in the same forward
pass, as additional rows with separate keys and values (or in one pass per role if the family cannot mix roles in a batch).
Rows then leave, and none joins; nor does one in families whose layers have another state than keys and values of all tokens.

Shapes: B active rows, T tokens so far, V vocabulary, W watched tokens, N roles per pass (the acting role first).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from selfeval.backbone.families.cache import appends_rows
from selfeval.backbone.roles import Backbone
from selfeval.errors import NotFiniteError
from selfeval.prompt import Prompt
from selfeval.rollout.draws import pick, row_draws
from selfeval.rollout.guide import Guide
from selfeval.rollout.passes import Pass, left_padded, passes
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.sampling import Filters
from selfeval.rollout.stop_strings import StopStrings
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens

__all__ = ["Batch", "joins_rows"]

_REFILL = 8
"""Rows join when an eighth of the places is free, because reading a single prompt costs almost as much as reading a few."""
_SLACK = 8
"""An eighth more columns than a row can have, so that the columns of a running batch rarely have to move to the front."""
_PREFILL_TOKENS = {"cpu": 2048}
"""Tokens of a pass over prompts. Those of a CPU fit its caches: passes of 8,192 tokens took 1.6 times as long."""
_MOST_PREFILL_TOKENS = 16384


def joins_rows(backbone: Backbone, guide: Guide | None) -> bool:
    """Return whether waiting requests can join a running batch of this model.

    Args:
        backbone: backbone of the batch.
        guide: optional value guidance of the batch.
    """
    return guide is None and appends_rows(backbone.loaded)


class Batch:
    """State of one batch during sampling.

    `prefill`, `draw` and `advance` do not depend on tensor values, except to check for NaN, and the planner calls them on
    shapes. `run` decides which rows are finished.

    Args:
        backbone: backbone with an acting role.
        requests: one per reply; the longest prompt comes first if there are fewer places.
        numbers: index of each request, which selects its random stream.
        limit: maximum number of new tokens per reply.
        stop, watch, seed, guide, thinking: as in `generate`.
        places: Optional. Number of rows at a time. Default: all requests.
        ended: Optional. Is called with the index and the reply of each request that is finished.

    Attributes:
        read: number of prompt tokens read so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        numbers: Sequence[int],
        limit: int,
        stop: Sequence[int],
        watch: Sequence[int],
        seed: int,
        guide: Guide | None,
        thinking: ThinkingTokens | None = None,
        places: int | None = None,
        ended: Callable[[int, Rollout], None] | None = None,
    ) -> None:
        context = backbone.loaded.context_length or sys.maxsize
        self.progress = [ReplyProgress(r.most(limit), context - len(r.prompt.ids), r.prompt, thinking) for r in requests]
        most = max(progress.most for progress in self.progress)
        self.backbone, self.requests, self.guide, self._ended = backbone, requests, guide, ended
        device = backbone.loaded.device
        self.ends = {*backbone.loaded.eos_ids, *stop}
        self._stop_strings = StopStrings(backbone.loaded.tokenizer)
        self.watch = torch.tensor(list(watch), dtype=torch.long, device=device)
        self.filters = Filters(requests, device)
        # Draw all random numbers in advance, so a row's number at a step does not depend on which rows are still alive.
        self.draws_BT = None
        if any(r.temperature for r in requests):
            self.draws_BT = row_draws(seed, numbers, most).to(device)
        self.joins = joins_rows(backbone, guide)
        self._places = len(requests) if places is None else min(places, len(requests))
        assert self.joins or self._places == len(requests), "rows cannot join a batch of this model"
        self.passes = self._made_passes(most)
        self._waiting = 0
        self.read = 0
        self.alive = torch.arange(0, device=device)
        self.steps_B = torch.zeros(0, dtype=torch.long, device=device)
        self._seen_BV: Tensor | None = None
        self.ids: list[list[int]] = [[] for _ in requests]
        self.logprobs: list[list[float]] = [[] for _ in requests]
        self.watched: list[list[tuple[float, ...]]] = [[] for _ in requests]

    def _made_passes(self, most: int) -> list[Pass]:
        if not self.joins:
            return passes(self.backbone, self.guide.roles if self.guide else (), most)
        width = max(len(r.prompt.ids) for r in self.requests)
        room = most + ((width + most) // _SLACK if self._places < len(self.requests) else 0)
        return [Pass(self.backbone, (), True, room, self._places, width)]

    @torch.no_grad()
    def run(self) -> None:
        logits_NBV, attention_BT = self.prefill()
        while True:
            tokens_B = self.draw(logits_NBV)
            del logits_NBV  # the next pass makes as many
            keep = self._record(tokens_B)
            joining = self._joining(len(keep))
            if not keep and not joining:
                break
            logits_NBV, attention_BT = self.advance(keep, tokens_B, attention_BT, joining)
            if self.joins and len(keep) < len(tokens_B):
                attention_BT = self._trimmed(attention_BT)

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Return next-token logits `[N, B, V]` and the attention mask after the prompts of the first rows.

        Each distinct prompt is read once, for all of these rows that share it.
        """
        if self.joins:
            return self._join(self._places, max(len(r.prompt.ids) for r in self.requests))
        distinct, owners = _distinct_prompts(self.requests)
        ids, attention = left_padded(distinct, self.backbone.loaded.pad_id, self.backbone.loaded.device)
        logits = self._forward(ids, attention)
        self.read = sum(len(prompt.ids) for prompt in distinct)
        self._enter(len(self.requests))
        if len(distinct) == len(self.requests):
            return logits, attention
        self._select(owners, len(distinct))
        rows = torch.tensor(owners, device=attention.device)
        return logits[:, rows], attention[rows]

    def _joining(self, alive: int) -> int:
        """Return how many waiting requests join now."""
        free, waiting = self._places - alive, len(self.requests) - self._waiting
        return min(free, waiting) if not alive or free * _REFILL >= self._places else 0

    def _join(self, count: int, width: int) -> tuple[Tensor, Tensor]:
        """Add rows for the next waiting requests; return their logits `[1, count, V]` and attention mask `[count, width]`."""
        parts = []
        requests = self.requests[self._waiting : self._waiting + count]
        for prompts, owners in _chunks(requests, _PREFILL_TOKENS.get(self.backbone.loaded.device.type, _MOST_PREFILL_TOKENS)):
            parts.append(self.passes[0].join(prompts, owners, width))
            self.read += sum(len(prompt.ids) for prompt in prompts)
        self._enter(count)
        logits, attention = zip(*parts, strict=True)
        return _joined(logits, 1), _joined(attention, 0)

    def _enter(self, count: int) -> None:
        """Note that the next waiting requests have rows now, behind the others."""
        new = torch.arange(self._waiting, self._waiting + count, device=self.alive.device)
        self.alive = torch.cat([self.alive, new])
        self.steps_B = torch.cat([self.steps_B, torch.zeros_like(new)])
        if self.filters.penalizes:
            self._see_prompts(self.requests[self._waiting : self._waiting + count])
        self._waiting += count

    def _see_prompts(self, requests: Sequence[Request]) -> None:
        """Note the tokens of the prompts, to which a repetition penalty applies."""
        size = self.backbone.output_head.vocabulary
        seen = torch.zeros(len(requests), size, dtype=torch.bool, device=self.alive.device)
        for row, request in enumerate(requests):
            seen[row, torch.tensor(request.prompt.ids, device=seen.device)] = True
        self._seen_BV = seen if self._seen_BV is None else torch.cat([self._seen_BV, seen])

    def _forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Compute next-token logits `[N, B, V]` after these tokens."""
        return _joined([part.logits(ids_BT, attention_BT) for part in self.passes], 0)

    def _select(self, rows: Sequence[int], of: int) -> None:
        for part in self.passes:
            part.select(rows, of)

    def _logprobs(self, logits_NBV: Tensor) -> Tensor:
        """Compute log-probs `[B, V]` from the logits, with the guide applied if there is one."""
        logprobs_NBV = torch.log_softmax(logits_NBV, dim=-1)
        return logprobs_NBV[0] if self.guide is None else self.guide.logprobs(logprobs_NBV[0], logprobs_NBV[1:])

    def advance(self, keep: Sequence[int], tokens_B: Tensor, attention_BT: Tensor, joining: int = 0) -> tuple[Tensor, Tensor]:
        """Drop all rows except `keep`, let waiting requests join, and return logits and attention mask after the new tokens.

        The last rows take the places of those that are dropped, so that the cache moves few of them.
        """
        if len(keep) < len(tokens_B):
            order = _in_holes(keep)
            self._select(order, len(tokens_B))
            rows = torch.tensor(order, dtype=torch.long, device=tokens_B.device)
            self.alive, self.steps_B = self.alive[rows], self.steps_B[rows]
            tokens_B, attention_BT = tokens_B[rows], attention_BT[rows]
            if self._seen_BV is not None:
                self._seen_BV = self._seen_BV[rows]
        logits, masks = [], []
        if keep:
            attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(attention_BT), 1)], dim=1)
            logits.append(self._forward(tokens_B[:, None], attention_BT))
            masks.append(attention_BT)
        if joining:
            more, mask = self._join(joining, attention_BT.shape[1])
            logits.append(more)
            masks.append(mask)
        return _joined(logits, 1), _joined(masks, 0)

    def _trimmed(self, attention_BT: Tensor) -> Tensor:
        """Drop the first columns that are padding in every row."""
        used = max(len(self.requests[row].prompt.ids) + self.progress[row].length for row in self.alive.tolist())
        if columns := attention_BT.shape[1] - used:
            self.passes[0].trim(columns)
        return attention_BT[:, columns:]

    def draw(self, logits_NBV: Tensor) -> Tensor:
        """Sample a token per row and record its log-prob and those of the watched tokens."""
        temperature_B = self.filters.temperature_N[self.alive]
        greedy_B = temperature_B == 0
        # Divide greedy rows by 1 instead of 0; their token is the argmax at any temperature.
        divisor_B1 = torch.where(greedy_B, 1.0, temperature_B)[:, None]
        logprobs_BV = self._logprobs(logits_NBV / divisor_B1)
        if bool(logprobs_BV[:, 0].isnan().any()):  # a single NaN or +inf logit makes the whole row NaN
            raise NotFiniteError(f"the logits for token {int(self.steps_B.max()) + 1} of a reply are NaN or infinite")
        wanted_BV = logprobs_BV
        if self._seen_BV is not None:
            penalized_BV = self.filters.penalized(
                self._logprobs(logits_NBV) if self.guide else logits_NBV[0], self._seen_BV, self.alive
            )
            wanted_BV = torch.log_softmax(penalized_BV / divisor_B1, dim=-1)
        tokens_B = wanted_BV.argmax(-1)
        if self.draws_BT is not None:
            drawn_B = pick(self.filters.allowed(wanted_BV, self.alive), self.draws_BT[self.alive, self.steps_B])
            tokens_B = torch.where(greedy_B, tokens_B, drawn_B)
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B[:, None], True)
        self.steps_B = self.steps_B + 1
        # From the full distribution, without filters: a later forward pass computes the same.
        self._drawn = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        # From the unscaled logits, because watched tokens are reported at temperature 1.
        self._watched = self._logprobs(logits_NBV)[:, self.watch] if len(self.watch) else None
        return tokens_B

    def _record(self, tokens_B: Tensor) -> list[int]:
        """Append the sampled tokens to their rows; return the positions of the rows that are not finished."""
        watched = self._watched.tolist() if self._watched is not None else None
        keep = []
        # `position` counts the rows in the batch, `row` the requests.
        for position, (row, token, logprob) in enumerate(
            zip(self.alive.tolist(), tokens_B.tolist(), self._drawn.tolist(), strict=True)
        ):
            self.ids[row].append(token)
            self.logprobs[row].append(logprob)
            if watched is not None:
                self.watched[row].append(tuple(watched[position]))
            progress = self.progress[row]
            progress.add(token)
            finished = token in self.ends or self._is_stopped(row)
            if finished or progress.length >= progress.limit:
                self._end(row, finished=finished)
            else:
                keep.append(position)
        return keep

    def _is_stopped(self, row: int) -> bool:
        """Return whether the last token completes a stop string outside of a chain of thought."""
        strings, progress = self.requests[row].stop_strings, self.progress[row]
        if not strings or progress.is_open:
            return False
        reply = self.ids[row][progress.hidden(finished=False) :]
        return bool(reply) and self._stop_strings.end(reply, strings)

    def _end(self, row: int, *, finished: bool) -> None:
        hidden = self.progress[row].hidden(finished=finished)
        if self._ended:
            self._ended(
                row, Rollout(tuple(self.ids[row]), tuple(self.logprobs[row]), finished, tuple(self.watched[row]), hidden)
            )


def _chunks(requests: Sequence[Request], tokens: int) -> Iterator[tuple[list[Prompt], list[int]]]:
    """Split requests, equal prompts next to each other, into passes over distinct prompts of up to this many tokens.

    Yields:
        The distinct prompts of a pass, and for each of its requests the index of the prompt.
    """
    distinct: list[Prompt] = []
    owners: list[int] = []
    for request in requests:
        if not distinct or request.prompt != distinct[-1]:
            widest = max(len(prompt.ids) for prompt in (*distinct, request.prompt))
            if distinct and widest * (len(distinct) + 1) > tokens:
                yield distinct, owners
                distinct, owners = [], []
            distinct.append(request.prompt)
        owners.append(len(distinct) - 1)
    yield distinct, owners


def _joined(parts: Sequence[Tensor], dimension: int) -> Tensor:
    """Concatenate tensors; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dimension)


def _distinct_prompts(requests: Sequence[Request]) -> tuple[list[Prompt], list[int]]:
    """Return the distinct prompts of the requests, and for each request the index of its prompt among them."""
    index: dict[Prompt, int] = {}
    owners = [index.setdefault(request.prompt, len(index)) for request in requests]
    return list(index), owners


def _in_holes(keep: Sequence[int]) -> list[int]:
    """Order ascending positions so that those below their number keep their place, and the others fill the gaps.

    Example:
        >>> _in_holes([0, 2, 3, 6])
        [0, 6, 2, 3]
    """
    count, kept = len(keep), set(keep)
    rest = reversed([position for position in keep if position >= count])
    return [place if place in kept else next(rest) for place in range(count)]
