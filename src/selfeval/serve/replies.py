"""Replies to one request: sampled in the worker's thread, awaited in the event loop, and cancelled if the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from selfeval.backbone.load import LoadedModel
from selfeval.rollout.live import NewToken
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.stop_strings import before_stop
from selfeval.serve.sampling import Sampling
from selfeval.serve.worker import Worker

__all__ = ["ClientGone", "Event", "SampledReply", "Spec", "replies_to", "sampled", "unless_gone"]

R = TypeVar("R")


class ClientGone(Exception):
    """The client closed the connection before its response was complete."""


@dataclass(frozen=True)
class Spec:
    """Replies to sample.

    Attributes:
        role: role that replies.
        requests: one per reply.
        seed: seed of all of them; they differ in `Request.stream`.
        limits: maximum number of new tokens of each reply.
        top: number of likeliest tokens to report for each token; None: no log-probs are read.
        thinks: whether a chain of thought is recognized, in which stop strings do not end the reply.
    """

    role: str
    requests: Sequence[Request]
    seed: int
    limits: Sequence[int]
    top: int | None = None
    thinks: bool = True


@dataclass
class SampledReply:
    """A reply with the alternatives of its tokens, as far as it is sampled.

    Attributes:
        ids, logprobs: tokens and their log-probs.
        tops: likeliest tokens at each, if they were requested.
        rollout: the whole reply, once it has ended.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    rollout: Rollout | None = None

    def add(self, token: NewToken) -> None:
        """Add a sampled token."""
        self.ids.append(token.id)
        self.logprobs.append(token.logprob)
        self.tops.append(token.top)

    @property
    def ended(self) -> Rollout:
        """The whole reply."""
        assert self.rollout is not None, "read before the reply has ended"
        return self.rollout

    def kept(self, stop_strings: Sequence[str], loaded: LoadedModel) -> int:
        """Return the number of leading tokens whose text is before the first stop string; the end token counts."""
        cut = before_stop(self.ended, stop_strings, loaded)
        return len(self.ended.ids) if cut is self.ended else len(cut.ids) - len(loaded.eos_ids[:1])


@dataclass(frozen=True)
class Event:
    """A token of a reply, its end, or its error; `index` is that of the reply's request."""

    index: int
    token: NewToken | None = None
    rollout: Rollout | None = None
    error: Exception | None = None


@contextmanager
def sampled(worker: Worker, spec: Spec, *, tokens: bool) -> Iterator[AsyncIterator[Event]]:
    """Sample replies inside the block; those that have not ended when it is left are cancelled.

    Args:
        worker: samples them.
        spec: the replies.
        tokens: whether each token is an event; otherwise only the ends are.
    """
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def post(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(events.put_nowait, event)

    samplings = [_sampling(spec, index, post, tokens) for index in range(len(spec.requests))]
    try:
        for sampling in samplings:
            worker.sample(sampling)
        yield _until_ended(events, len(samplings))
    finally:
        for sampling in samplings:
            worker.cancel(sampling)


def _sampling(spec: Spec, index: int, post: Callable[[Event], None], tokens: bool) -> Sampling:
    return Sampling(
        role=spec.role,
        request=spec.requests[index],
        seed=spec.seed,
        limit=spec.limits[index],
        top=spec.top or 0,
        thinks=spec.thinks,
        on_token=(lambda token: post(Event(index, token=token))) if tokens else None,
        on_end=lambda rollout: post(Event(index, rollout=rollout)),
        on_error=lambda error: post(Event(index, error=error)),
    )


async def _until_ended(events: asyncio.Queue[Event], count: int) -> AsyncIterator[Event]:
    """Yield events until all replies have ended.

    Raises:
        Exception: the error of the first reply that has one.
    """
    while count:
        event = await events.get()
        if event.error is not None:
            raise event.error
        yield event
        count -= event.rollout is not None


async def replies_to(worker: Worker, spec: Spec) -> list[SampledReply]:
    """Sample replies and return them when all have ended, in the order of their requests."""
    replies = [SampledReply() for _ in spec.requests]
    # Tokens are events only if their alternatives are read: an event per token wakes the loop.
    with sampled(worker, spec, tokens=bool(spec.top)) as events:
        async for event in events:
            if event.token is not None:
                replies[event.index].add(event.token)
            elif event.rollout is not None:
                replies[event.index].rollout = event.rollout
    return replies


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, R]) -> R:
    """Await work, and cancel it if the client closes the connection first.

    Raises:
        ClientGone: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: HttpRequest) -> None:
    """Return when the client has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
