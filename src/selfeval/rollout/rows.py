"""The rows of a batch while their replies are sampled: one decoding step at a time, with rows that leave and rows that join.

Rows share the columns of the cache: the last column holds the last token of every row, with padding on the left of shorter
rows. A new row is therefore a prompt whose last token is in the last column. Columns that are padding in all rows are dropped.

With a guide, value functions modify the distribution of the acting role. Their roles read the same tokens in the same forward
pass, as additional rows with separate keys and values (or in one pass per role if the family cannot mix roles in a batch).
Rows then leave, and none joins; nor does one in families whose layers have another state than keys and values of all tokens.

Shapes: B rows, T tokens so far, V vocabulary, W watched tokens, N roles per pass (the acting role first).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfeval.backbone.budget import prompt_pass_tokens
from selfeval.backbone.families.cache import appends_rows
from selfeval.backbone.roles import Backbone
from selfeval.errors import NotFiniteError
from selfeval.prompt import Prompt
from selfeval.rollout.draws import pick
from selfeval.rollout.guide import Guide
from selfeval.rollout.passes import Pass, left_padded
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.sampling import Filters
from selfeval.rollout.stop_strings import StopStrings
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens

__all__ = ["Row", "Rows", "joins_rows"]


def joins_rows(backbone: Backbone, guide: Guide | None) -> bool:
    """Return whether waiting requests can join a running batch of this model.

    Args:
        backbone: backbone of the batch.
        guide: optional value guidance of the batch.
    """
    return guide is None and appends_rows(backbone.loaded)


class Row:
    """One reply while it is sampled.

    Args:
        backbone: backbone that samples it.
        request: the request.
        limit: maximum number of new tokens, if the request has no lower one.
        thinking: Optional. Markers of a chain of thought, and its limit.
        top: number of likeliest tokens that are noted at every step. Default: 0.
        ended: Optional. Is called with the reply once it is finished.

    Attributes:
        progress: length and limit of the reply.
        draws: random numbers, one per token; None if the request is greedy.
        ids, logprobs, watched: as in `Rollout`, so far.
        tops: the likeliest tokens after the last step, as pairs of id and log-prob, best first.
        rollout: the reply; None before its end.
    """

    def __init__(
        self,
        backbone: Backbone,
        request: Request,
        limit: int,
        thinking: ThinkingTokens | None = None,
        *,
        top: int = 0,
        ended: Callable[[Rollout], None] | None = None,
    ) -> None:
        room = (backbone.loaded.context_length or sys.maxsize) - len(request.prompt.ids)
        self.request, self.top, self._ended = request, top, ended
        self.progress = ReplyProgress(request.most(limit), room, request.prompt, thinking)
        self.draws: NDArray[np.float64] | None = None
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.watched: list[tuple[float, ...]] = []
        self.tops: tuple[tuple[int, float], ...] = ()
        self.rollout: Rollout | None = None

    @property
    def text(self) -> Prompt:
        """The prompt and the reply so far."""
        return self.request.prompt.followed_by(self.ids) if self.ids else self.request.prompt

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and the reply so far."""
        return len(self.request.prompt.ids) + self.progress.length

    @property
    def draw(self) -> float:
        """The random number of the next token."""
        return 0.0 if self.draws is None else float(self.draws[self.progress.length])

    def add(self, token: int, logprob: float) -> None:
        """Append a sampled token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.progress.add(token)

    def end(self, *, finished: bool) -> None:
        """Make the reply from the tokens so far."""
        hidden = self.progress.hidden(finished=finished)
        self.rollout = Rollout(tuple(self.ids), tuple(self.logprobs), finished, tuple(self.watched), hidden)
        if self._ended:
            self._ended(self.rollout)


class Rows:
    """The rows of a batch: the passes over them, their sampling settings, and their tokens.

    `read`, `join`, `draw` and `advance` do not depend on tensor values, except to check for NaN, and the planner calls them on
    shapes. `record` decides which rows are finished.

    Args:
        backbone: backbone with an acting role.
        parts: the forward passes; a single one if rows can join.
        stop, watch, guide: as in `generate`.

    Attributes:
        rows: the rows, in the order of the cache.
        tokens_read: number of prompt tokens read so far.
    """

    def __init__(
        self,
        backbone: Backbone,
        parts: Sequence[Pass],
        stop: Sequence[int] = (),
        watch: Sequence[int] = (),
        guide: Guide | None = None,
    ) -> None:
        device = backbone.loaded.device
        self.backbone, self.passes, self.guide = backbone, parts, guide
        self.joins = joins_rows(backbone, guide)
        self.rows: list[Row] = []
        self.tokens_read = 0
        self._ends = {*backbone.loaded.eos_ids, *stop}
        self._stop_strings = StopStrings(backbone.loaded.tokenizer)
        self._watch = torch.tensor(list(watch), dtype=torch.long, device=device)
        self._filters = Filters((), device)
        self._seen_BV: Tensor | None = None
        self._top = 0

    def clear(self) -> None:
        """Drop all rows; the memory of the cache stays."""
        self._select((), len(self.rows))
        self.rows, self._filters, self._seen_BV = [], Filters((), self.backbone.loaded.device), None

    # -- rows enter and leave ---------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Begin with these rows; return next-token logits `[N, B, V]` and the attention mask after their tokens so far.

        Each distinct prompt is read once, for all of the rows that share it.
        """
        if self.joins:
            return self.join(rows, max(len(row.text.ids) for row in rows))
        distinct, owners = _distinct([row.text for row in rows])
        ids, attention = left_padded(distinct, self.backbone.loaded.pad_id, self.backbone.loaded.device)
        logits = self._forward(ids, attention)
        self.tokens_read += sum(len(prompt.ids) for prompt in distinct)
        self._enter(rows)
        if len(distinct) == len(rows):
            return logits, attention
        self._select(owners, len(distinct))
        index = torch.tensor(owners, device=attention.device)
        return logits[:, index], attention[index]

    def join(self, rows: Sequence[Row], width: int) -> tuple[Tensor, Tensor]:
        """Add rows behind the others; return their logits `[1, B, V]` and attention mask `[B, width]`."""
        parts = []
        most = prompt_pass_tokens(self.backbone.loaded.device.type)
        for prompts, owners in _chunks([row.text for row in rows], most):
            parts.append(self.passes[0].join(prompts, owners, width))
            self.tokens_read += sum(len(prompt.ids) for prompt in prompts)
        self._enter(rows)
        logits, attention = zip(*parts, strict=True)
        return _joined(logits, 1), _joined(attention, 0)

    def _enter(self, rows: Sequence[Row]) -> None:
        device = self.backbone.loaded.device
        before = len(self.rows)
        self.rows = [*self.rows, *rows]
        self._filters = Filters([row.request for row in self.rows], device)
        self._top = max(row.top for row in self.rows)
        if not self._filters.penalizes:
            self._seen_BV = None
            return
        size = self.backbone.output_head.vocabulary
        if self._seen_BV is None:
            # None of the rows so far has a penalty.
            self._seen_BV = torch.zeros(before, size, dtype=torch.bool, device=device)
        self._seen_BV = torch.cat([self._seen_BV, _seen(rows, size, device)])

    def advance(
        self, keep: Sequence[int], tokens_B: Tensor, attention_BT: Tensor, joining: Sequence[Row] = ()
    ) -> tuple[Tensor, Tensor]:
        """Drop all rows except `keep`, let others join, and return logits and attention mask after the new tokens.

        The last rows take the places of those that are dropped, so that the cache moves few of them.
        """
        if len(keep) < len(tokens_B):
            order = _in_holes(keep)
            self._select(order, len(tokens_B))
            self.rows = [self.rows[position] for position in order]
            index = torch.tensor(order, dtype=torch.long, device=tokens_B.device)
            tokens_B, attention_BT = tokens_B[index], attention_BT[index]
            self._filters.select(index)
            if self._seen_BV is not None:
                self._seen_BV = self._seen_BV[index]
        logits, masks = [], []
        if keep:
            attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(attention_BT), 1)], dim=1)
            logits.append(self._forward(tokens_B[:, None], attention_BT))
            masks.append(attention_BT)
        if joining:
            widest = max(len(row.text.ids) for row in joining)
            width = max(widest, attention_BT.shape[1]) if keep else widest
            self.passes[0].resize(width)
            masks = [nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks]
            more, mask = self.join(joining, width)
            logits.append(more)
            masks.append(mask)
        return _joined(logits, 1), _joined(masks, 0)

    def read_draft(self, last_B: Tensor, draft: Sequence[int], attention_BT: Tensor) -> Tensor:
        """Return logits `[1, 1, N, V]` of a single row after its last token and after each token of a draft.

        The draft is in the cache then; `take_back` drops the tokens that turn out to be wrong.

        Args:
            last_B: the row's last token, which is not in the cache yet.
            draft: tokens that may follow it.
            attention_BT: attention mask of the tokens in the cache.
        """
        ids = torch.cat([last_B, last_B.new_tensor(draft)])[None]
        more = attention_BT.new_ones(1, ids.shape[1])
        return self.passes[0].logits(ids, torch.cat([attention_BT, more], dim=1), ids.shape[1])

    def take_back(self, tokens: int) -> None:
        """Drop the last tokens of the cache."""
        if tokens:
            self.passes[0].take_back(tokens)

    def trimmed(self, attention_BT: Tensor) -> Tensor:
        """Drop the first columns that are padding in every row."""
        used = max(row.length for row in self.rows)
        if columns := attention_BT.shape[1] - used:
            self.passes[0].resize(used)
        return attention_BT[:, columns:]

    def _forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Compute next-token logits `[N, B, V]` after these tokens."""
        return _joined([part.logits(ids_BT, attention_BT)[:, :, -1] for part in self.passes], 0)

    def _select(self, rows: Sequence[int], of: int) -> None:
        for part in self.passes:
            part.select(rows, of)

    # -- tokens -----------------------------------------------------------------------------------------------------------

    def draw(self, logits_NBV: Tensor) -> Tensor:
        """Sample a token per row and note its log-prob, and those of the watched and of the likeliest tokens.

        Raises:
            NotFiniteError: logits are NaN or infinite. Nothing has changed then.
        """
        logprobs_BV = self._tempered(logits_NBV)
        if bool(logprobs_BV[:, 0].isnan().any()):  # a single NaN or +inf logit makes the whole row NaN
            longest = max(row.progress.length for row in self.rows)
            raise NotFiniteError(f"the logits for token {longest + 1} of a reply are NaN or infinite")
        wanted_BV = logprobs_BV
        if self._seen_BV is not None:
            penalized_BV = self._filters.penalized(self._logprobs(logits_NBV) if self.guide else logits_NBV[0], self._seen_BV)
            wanted_BV = torch.log_softmax(penalized_BV / self._filters.divisor_B1, dim=-1)
        tokens_B = wanted_BV.argmax(-1)
        if self._filters.samples:
            draws_B = torch.tensor([row.draw for row in self.rows], dtype=torch.float64, device=tokens_B.device)
            drawn_B = pick(self._filters.allowed(wanted_BV), draws_B)
            tokens_B = torch.where(self._filters.greedy_B, tokens_B, drawn_B)
        # From the full distribution, without filters: a later forward pass computes the same.
        self._drawn = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        # From the unscaled logits, because watched tokens are reported at temperature 1.
        self._watched = self._logprobs(logits_NBV)[:, self._watch] if len(self._watch) else None
        self._likeliest = logprobs_BV.topk(min(self._top, logprobs_BV.shape[1])) if self._top else None
        # Last: if memory runs out above, the rows are as before.
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B[:, None], True)
        return tokens_B

    def broken(self, logits_NBV: Tensor) -> list[int]:
        """Return the positions of the rows whose logits are NaN or infinite."""
        positions: list[int] = self._tempered(logits_NBV)[:, 0].isnan().nonzero()[:, 0].tolist()
        return positions

    def record(self, tokens_B: Tensor) -> list[int]:
        """Append the sampled tokens to their rows; return the positions of the rows that are not finished."""
        watched = self._watched.tolist() if self._watched is not None else None
        tops = _pairs(*self._likeliest) if self._likeliest is not None else None
        keep = []
        for position, (row, token, logprob) in enumerate(zip(self.rows, tokens_B.tolist(), self._drawn.tolist(), strict=True)):
            row.add(token, logprob)
            if watched is not None:
                row.watched.append(tuple(watched[position]))
            if tops is not None:
                row.tops = tops[position][: row.top]
            finished = token in self._ends or self._is_stopped(row)
            if finished or row.progress.length >= row.progress.limit:
                row.end(finished=finished)
            else:
                keep.append(position)
        return keep

    def _is_stopped(self, row: Row) -> bool:
        """Return whether the last token completes a stop string outside of a chain of thought."""
        strings, progress = row.request.stop_strings, row.progress
        if not strings or progress.is_open:
            return False
        reply = row.ids[progress.hidden(finished=False) :]
        return bool(reply) and self._stop_strings.end(reply, strings)

    def _tempered(self, logits_NBV: Tensor) -> Tensor:
        """Compute log-probs `[B, V]` at the temperature of each row."""
        return self._logprobs(logits_NBV / self._filters.divisor_B1)

    def _logprobs(self, logits_NBV: Tensor) -> Tensor:
        """Compute log-probs `[B, V]` from the logits, with the guide applied if there is one."""
        logprobs_NBV = torch.log_softmax(logits_NBV, dim=-1)
        return logprobs_NBV[0] if self.guide is None else self.guide.logprobs(logprobs_NBV[0], logprobs_NBV[1:])


def _seen(rows: Sequence[Row], size: int, device: torch.device) -> Tensor:
    """Return the tokens that rows have so far, to which a repetition penalty applies, `[B, V]`."""
    seen_BV = torch.zeros(len(rows), size, dtype=torch.bool, device=device)
    for place, row in enumerate(rows):
        seen_BV[place, torch.tensor(row.text.ids, device=device)] = True
    return seen_BV


def _pairs(logprobs_BK: Tensor, ids_BK: Tensor) -> list[tuple[tuple[int, float], ...]]:
    """Return tokens and their log-probs for each row."""
    return [tuple(zip(*row, strict=True)) for row in zip(ids_BK.tolist(), logprobs_BK.tolist(), strict=True)]


def _chunks(texts: Sequence[Prompt], tokens: int) -> Iterator[tuple[list[Prompt], list[int]]]:
    """Split prompts, equal ones next to each other, into passes over distinct prompts of up to this many tokens.

    Yields:
        The distinct prompts of a pass, and for each of its rows the index of the prompt.
    """
    distinct: list[Prompt] = []
    owners: list[int] = []
    for text in texts:
        if not distinct or text != distinct[-1]:
            widest = max(len(prompt.ids) for prompt in (*distinct, text))
            if distinct and widest * (len(distinct) + 1) > tokens:
                yield distinct, owners
                distinct, owners = [], []
            distinct.append(text)
        owners.append(len(distinct) - 1)
    yield distinct, owners


def _joined(parts: Sequence[Tensor], dimension: int) -> Tensor:
    """Concatenate tensors; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dimension)


def _distinct(texts: Sequence[Prompt]) -> tuple[list[Prompt], list[int]]:
    """Return the distinct prompts, and for each prompt its index among them."""
    index: dict[Prompt, int] = {}
    owners = [index.setdefault(text, len(index)) for text in texts]
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
