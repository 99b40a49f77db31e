"""An open batch: requests join and leave it while it runs, as a server needs it.

The rows, their cache and their sampling are those of `generate` (`rows.py`). Only who joins and when is decided here:

- A waiting request joins before the next decoding step if a place is free, in the order of arrival.
- Columns are added in front of the cache for a prompt that is longer than the rows that are there.
- When memory runs out, the requests wait again, with half as many places. Their tokens are kept: a request that has begun
  joins with its prompt and its reply so far, and continues behind them.

- A reply that is sampled alone is continued by drafts (`drafts.py`): one pass may then give it several tokens.

Left out: growing back after memory ran out, and prompts that are split over several steps. A long prompt therefore delays one
step of the other rows.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfeval.backbone.budget import Phase
from selfeval.backbone.families.cache import cache_bytes, check_state
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import refuse_images
from selfeval.errors import InputError, MemoryLimitError, NotFiniteError, is_out_of_memory
from selfeval.rollout.batch import SLACK
from selfeval.rollout.drafts import DraftCounts, Drafts, EarlierReplies, Speculation
from selfeval.rollout.draws import row_draws
from selfeval.rollout.engine import by_length, note_tokens
from selfeval.rollout.guide import Guide
from selfeval.rollout.passes import Pass, passes
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.rows import Row, Rows, joins_rows
from selfeval.rollout.thinking import ThinkingTokens

__all__ = ["LiveBatch", "NewToken", "Ticket"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewToken:
    """A sampled token.

    Attributes:
        id: id of the token.
        logprob: its log-prob, as in `Rollout.logprobs`.
        top: the likeliest tokens and their log-probs at the same temperature, best first, if the request asked for them.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class _Callbacks:
    token: Callable[[NewToken], None] | None
    end: Callable[[Rollout], None] | None
    error: Callable[[Exception], None] | None


class Ticket:
    """A request of a `LiveBatch`.

    Attributes:
        rollout: the reply; None before its end, and if the request was cancelled or has failed.
        error: the error with which the request has failed, if it has.
        drafts: drafts of the reply; None before it is sampled alone.
    """

    def __init__(self, row: Row, seed: int, callbacks: _Callbacks) -> None:
        self.rollout: Rollout | None = None
        self.error: Exception | None = None
        self.drafts: Drafts | None = None
        self._open: tuple[Row, int, _Callbacks] | None = (row, seed, callbacks)

    @property
    def row(self) -> Row | None:
        """The row of a request that is waiting or running."""
        return self._open[0] if self._open else None

    def begin(self) -> Row:
        """Return the row, with its random numbers, which a waiting request does not hold."""
        assert self._open is not None, "a closed request does not join"
        row, seed, _ = self._open
        if row.draws is None and row.request.temperature:
            row.draws = row_draws(seed, [row.request.stream or 0], row.progress.most)[0]
        return row

    def put(self, token: NewToken) -> None:
        """Call the callback for a token; not after the request was cancelled."""
        if self._open and (call := self._open[2].token):
            call(token)

    def close(self, rollout: Rollout | None = None, error: Exception | None = None) -> None:
        """Let go of the row and of the callbacks, and call the one for a reply or an error."""
        if self._open is None:
            return
        callbacks, self._open = self._open[2], None
        self.rollout, self.error = rollout, error
        if rollout is not None and callbacks.end:
            callbacks.end(rollout)
        if error is not None and callbacks.error:
            callbacks.error(error)


class LiveBatch:
    """An open batch of replies of one role: requests join and leave it while it runs.

    A reply depends on its request and its seed alone. It equals that of `generate` with the same seed and stream 0, except for
    the last bits of its log-probs, whatever the other requests are and whenever they join or leave. In 16 bits, and rarely in
    fp32, these last bits decide between two tokens that are about equally likely.

    In families whose rows cannot join a running batch (Mamba, sliding windows, ChatGLM-6B), and with a guide, requests wait
    until all replies of the current batch have ended.

    All calls must come from one thread. Callbacks are called by `step`; they may call `add` and `cancel`, and must not raise.
    The role may be trained or replaced only while no request is running.

    Args:
        backbone: backbone with the role.
        role: the acting role.
        places: number of rows at a time (a guided reply counts once per role); halved when memory runs out.
        max_tokens: maximum tokens of a prompt with its reply. The cache has room for `places` such rows and an eighth more, and
            is allocated once, when the first request joins.
        guide: optional value guidance of every reply.
        thinking: optional markers of a chain of thought, and its limit; a request can do without (`add`).
        speculation: when drafts of the next tokens are read, while a single request is running: never, always, or where
            earlier drafts were correct often enough. The tokens are the same, up to rounding as above. Default: `auto`.
        drafts: Optional. Counts to which those of this batch are added. Default: separate ones.

    Attributes:
        drafts: number of drafted tokens, and of those that were correct.

    Raises:
        InputError: a size is not positive.
        ModelError: the model's cache does not support removing rows.
        RoleError: there is no such role.

    Example:
        >>> def reply(backbone, request):
        ...     batch = LiveBatch(backbone, "policy", places=8, max_tokens=2048)
        ...     ticket = batch.add(request, seed=0, limit=64, on_token=print)
        ...     while batch.step():
        ...         pass
        ...     return ticket.rollout
    """

    def __init__(
        self,
        backbone: Backbone,
        role: str,
        *,
        places: int,
        max_tokens: int,
        guide: Guide | None = None,
        thinking: ThinkingTokens | None = None,
        speculation: Speculation = Speculation.AUTO,
        drafts: DraftCounts | None = None,
    ) -> None:
        for name, value in (("places", places), ("max_tokens", max_tokens)):
            if value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
        check_state(backbone.loaded)
        backbone.refuse_mixed_rows("sampling")
        for name in (role, *(guide.roles if guide else ())):
            backbone.roles.check(name)
        self._backbone, self._role, self._guide, self._thinking = backbone, role, guide, thinking
        self._places, self._max_tokens = places, min(max_tokens, backbone.loaded.context_length or max_tokens)
        self._joins = joins_rows(backbone, guide)
        # A guide has further rows, and other caches cannot drop the tokens of a wrong draft.
        self._speculation = speculation if self._joins else Speculation.OFF
        self._earlier, self.drafts = EarlierReplies(), drafts or DraftCounts()
        self._is_drafting = False
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Row, Ticket] = {}
        self._names = backbone.roles.names
        # The rows, and between two steps their last tokens, the attention mask, and the positions of those that continue.
        self._rows: Rows | None = None
        self._capacity = 0
        self._keep: list[int] = []
        self._tokens_B = torch.zeros(0, dtype=torch.long, device=backbone.loaded.device)
        self._attention_BT = torch.zeros(0, 0, dtype=torch.long, device=backbone.loaded.device)

    @property
    def waiting(self) -> int:
        """Number of requests that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of requests that have a place."""
        return len(self._running)

    @property
    def places(self) -> int:
        """Number of requests that can run at a time now."""
        return max(1, self._backbone.budget.within(Phase.ROLLOUT, self._places) // self._rows_per_request)

    @property
    def max_tokens(self) -> int:
        """Maximum tokens of a prompt with its reply: that of the constructor, within the model's context."""
        return self._max_tokens

    @property
    def cache_bytes(self) -> int:
        """Bytes that are allocated for keys and values; 0 before the first request."""
        return sum(cache_bytes(part.cache) for part in self._rows.passes) if self._rows else 0

    def add(
        self,
        request: Request,
        *,
        seed: int,
        limit: int,
        top: int = 0,
        thinks: bool = True,
        on_token: Callable[[NewToken], None] | None = None,
        on_end: Callable[[Rollout], None] | None = None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> Ticket:
        """Add a request, which joins in `step` as soon as a place is free.

        Args:
            request: prompt and sampling parameters. Its random stream is number 0 if it names none.
            seed: sampling seed, from 0 to 2**64 - 1.
            limit: maximum number of new tokens.
            top: number of likeliest tokens to return with each token. Default: 0.
            thinks: recognize a chain of thought by the markers of the batch. False: all tokens are the reply. Default: True.
            on_token: Optional. Is called with each sampled token, the end-of-sequence token included.
            on_end: Optional. Is called with the reply, after the callback for its last token.
            on_error: Optional. Is called if the request fails: with a MemoryLimitError if it does not fit in memory alone, or
                a NotFiniteError if its logits are NaN.

        Raises:
            InputError: an argument is out of range, or the prompt with the reply exceeds `max_tokens`.
            ModelError: the prompt has an image.
        """
        thinking = self._thinking if thinks else None
        self._check(request, seed, limit, top, thinking)
        row = Row(self._backbone, request, limit, thinking, top=top)
        ticket = Ticket(row, seed, _Callbacks(on_token, on_end, on_error))
        self._waiting.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Remove a request, whose place is free in the next step. No callback is called; does nothing after its end."""
        row = ticket.row
        if row is None:
            return
        ticket.close()
        if self._running.pop(row, None) is not None:
            if not self._running:
                self._clear()
        elif ticket in self._waiting:  # otherwise it has ended in this step, and its callback is about to be called
            self._waiting.remove(ticket)

    def step(self) -> bool:
        """Let waiting requests join, sample a token of every reply, and call the callbacks.

        Returns:
            Whether any request is left.

        Raises:
            Exception: a pass failed for another reason than memory. The requests wait again.
        """
        sampled = self._sample()
        if sampled is None:
            self._halve()
        else:
            self._report(sampled)
        return bool(self._waiting or self._running)

    # -- one step ---------------------------------------------------------------------------------------------------------

    def _sample(self) -> list[tuple[Ticket, NewToken | NotFiniteError]] | None:
        """Sample a token of every reply; return None if memory ran out."""
        try:
            with torch.no_grad(), self._backbone.acting_as(self._role):
                return self._decode()
        except Exception as error:
            if not is_out_of_memory(error):
                self._wait_again()
                raise
        # Outside the except block, because the traceback would keep the tensors of the failed pass alive.
        return None

    def _decode(self) -> list[tuple[Ticket, NewToken | NotFiniteError]]:
        keep = [place for place in self._keep if self._rows is not None and self._rows.rows[place] in self._running]
        joining = self._take(len(keep))
        if not keep and not joining:
            return []
        draft = [] if joining else self._draft(keep)
        self._is_drafting = bool(draft)
        if draft:
            return self._decode_draft(draft)
        logits_NBV = self._forward(keep, [ticket.begin() for ticket in joining])
        rows = self._rows
        assert rows is not None
        broken, self._tokens_B = _drawn(rows, logits_NBV)
        del logits_NBV
        tickets = [self._running[row] for row in rows.rows]
        self._keep = rows.record(self._tokens_B)  # `_report` takes the broken ones out of the running requests
        note_tokens(0, len(tickets) - len(broken))
        return [
            (ticket, broken.get(place) or NewToken(row.ids[-1], row.logprobs[-1], row.tops))
            for place, (ticket, row) in enumerate(zip(tickets, rows.rows, strict=True))
        ]

    def _draft(self, keep: list[int]) -> list[int]:
        """Return a draft of the next tokens if a single reply is being sampled, and was so in the last step."""
        if self._speculation is Speculation.OFF or len(keep) != 1 or len(self._tokens_B) != 1 or self._rows is None:
            return []
        row = self._rows.rows[0]
        ticket, prompt = self._running[row], row.request.prompt.ids
        if ticket.drafts is None:
            always = self._speculation is Speculation.ON
            ticket.drafts = Drafts(prompt, self._earlier.to(prompt), always=always)
        # Not beyond its last token but one, so that the reply needs no more columns than without drafts.
        return ticket.drafts.next(row.ids, row.progress.limit - row.progress.length - 1)

    def _decode_draft(self, draft: list[int]) -> list[tuple[Ticket, NewToken | NotFiniteError]]:
        """Sample the tokens of a single reply until one differs from the draft, each with its own random number."""
        rows = self._rows
        assert rows is not None
        self._refresh(rows)
        row = rows.rows[0]
        ticket, before = self._running[row], row.progress.length
        logits_NBTV = rows.read_draft(self._tokens_B, draft, self._attention_BT)
        sampled: list[tuple[Ticket, NewToken | NotFiniteError]] = []
        for place, drafted in enumerate([*draft, None]):
            try:
                broken, self._tokens_B = _drawn(rows, logits_NBTV[:, :, place])
            except Exception:
                if not sampled:
                    raise
                break  # the tokens so far are reported first; the next step computes this one again
            self._keep = rows.record(self._tokens_B)
            sampled.append((ticket, broken.get(0) or NewToken(row.ids[-1], row.logprobs[-1], row.tops)))
            if broken or row.ids[-1] != drafted:
                break
            self.drafts.accepted += 1
            if not self._keep:
                break
        self.drafts.read += len(draft)
        new = row.progress.length - before
        rows.take_back(len(draft) + 1 - new)
        self._attention_BT = torch.cat([self._attention_BT, self._attention_BT.new_ones(1, new)], dim=1)
        note_tokens(0, sum(isinstance(item, NewToken) for _, item in sampled))
        return sampled

    def _take(self, running: int) -> list[Ticket]:
        """Take the waiting requests that join now."""
        if running and not self._joins:
            return []
        free = max(0, min(self.places, self._capacity if running else self.places) - running)
        joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        # Noted before the pass over their prompts, so that none is lost if memory runs out.
        self._running |= {ticket.begin(): ticket for ticket in joining}
        return sorted(joining, key=lambda ticket: by_length(ticket.begin().text), reverse=True)

    def _forward(self, keep: list[int], joining: list[Row]) -> Tensor:
        """Return next-token logits `[N, B, V]` of the rows that are kept, then of those that join."""
        rows = self._rows
        if rows is None or (not keep and (not self._joins or self._capacity != self.places)):
            self._rows = None  # before the next one is allocated
            self._rows = rows = self._new_rows(joining)
        self._refresh(rows, always=not keep)
        before, dropped = rows.tokens_read, len(keep) < len(self._tokens_B)
        if self._joins or keep:
            logits, self._attention_BT = rows.advance(keep, self._tokens_B, self._attention_BT, joining)
        else:
            logits, self._attention_BT = rows.read(joining)
        if dropped and self._joins:
            self._attention_BT = rows.trimmed(self._attention_BT)
        note_tokens(rows.tokens_read - before, 0)
        return logits

    def _refresh(self, rows: Rows, *, always: bool = False) -> None:
        """Let the passes follow a change of the model's roles."""
        if always or self._backbone.roles.names != self._names:
            self._names = self._backbone.roles.names
            for part in rows.passes:
                part.refresh()

    def _new_rows(self, joining: list[Row]) -> Rows:
        self._clear()
        self._capacity = self.places
        if self._joins:
            room = self._max_tokens + self._max_tokens // SLACK
            parts = [Pass(self._backbone, (), True, room, self._capacity)]
        else:
            parts = passes(self._backbone, self._guide.roles if self._guide else (), max(r.progress.most for r in joining))
        return Rows(self._backbone, parts, guide=self._guide)

    def _report(self, sampled: list[tuple[Ticket, NewToken | NotFiniteError]]) -> None:
        """Call the callbacks, and let go of the requests that have ended."""
        ended = [(ticket, row.rollout) for row, ticket in self._running.items() if row.rollout is not None]
        failed = {ticket: item for ticket, item in sampled if isinstance(item, NotFiniteError)}
        gone = {ticket for ticket, _ in ended} | failed.keys()
        self._running = {row: ticket for row, ticket in self._running.items() if ticket not in gone}
        if not self._running:
            self._clear()
        for ticket, item in sampled:
            if isinstance(item, NewToken):
                ticket.put(item)
        for ticket, error in failed.items():
            ticket.close(error=error)
        for ticket, rollout in ended:
            if self._speculation is not Speculation.OFF and (row := ticket.row):
                self._earlier.add(row.request.prompt.ids, rollout.ids)
            ticket.close(rollout)

    def _clear(self) -> None:
        """Drop all rows; keep the memory of the cache if others can join it."""
        self._keep, self._tokens_B, self._attention_BT = [], self._tokens_B.new_zeros(0), self._attention_BT.new_zeros(0, 0)
        if self._rows is not None and self._joins:
            self._rows.clear()
        else:
            self._rows = None

    # -- errors -----------------------------------------------------------------------------------------------------------

    @property
    def _rows_per_request(self) -> int:
        return 1 if self._guide is None else 1 + len(self._guide.roles)

    def _wait_again(self) -> None:
        """Let the running requests wait, before all others. Their tokens are kept."""
        self._rows = None
        self._clear()
        self._waiting.extendleft(reversed(self._running.values()))
        self._running.clear()

    def _halve(self) -> None:
        """Continue with half the places; a request that does not fit alone fails."""
        self._wait_again()
        if self._is_drafting:  # a single token takes less memory
            _LOG.warning("memory ran out while drafts were read; this batch continues without drafts")
            self._speculation = Speculation.OFF
            return
        places = self.places
        try:
            self._backbone.budget.note_failure(Phase.ROLLOUT, places * self._rows_per_request, alone=places == 1)
        except MemoryLimitError as error:
            self._waiting.popleft().close(error=error)

    def _check(self, request: Request, seed: int, limit: int, top: int, thinking: ThinkingTokens | None) -> None:
        """Refuse a request that cannot be answered."""
        refuse_images(self._backbone, [request.prompt])
        size, vocabulary = len(request.prompt.ids), self._backbone.output_head.vocabulary
        for name, value, least, most in (
            ("limit", limit, 1, None),
            ("seed", seed, 0, 2**64 - 1),
            ("top", top, 0, vocabulary),
            ("tokens of the prompt", size, 1, None),
        ):
            if value < least or (most is not None and value > most):
                raise InputError(
                    f"{name}: {value}; must be {f'at least {least}' if most is None else f'from {least} to {most}'}"
                )
        new = request.most(limit)
        if thinking is not None:
            # Thinking has the room that is left in the context, as in `generate`; the reply itself has to fit.
            room = (self._backbone.loaded.context_length or sys.maxsize) - size
            new = max(new, min(new + (thinking.limit or 0), room))
        if size + new > self._max_tokens:
            raise InputError(
                f"a prompt of {size} tokens and a reply of up to {new} exceed the limit of {self._max_tokens} tokens for both; "
                f"shorten the prompt, or request at most {max(0, self._max_tokens - size)} new tokens"
            )


def _drawn(rows: Rows, logits_NBV: Tensor) -> tuple[dict[int, NotFiniteError], Tensor]:
    """Sample a token per row; return the errors of rows with NaN logits by their position, and the tokens."""
    try:
        return {}, rows.draw(logits_NBV)
    except NotFiniteError:
        broken = rows.broken(logits_NBV)
    logits_NBV[:, broken] = 0  # any token: they are dropped
    errors = {place: f"the logits for token {rows.rows[place].progress.length + 1} of this reply" for place in broken}
    return {place: NotFiniteError(f"{what} are NaN or infinite") for place, what in errors.items()}, rows.draw(logits_NBV)
