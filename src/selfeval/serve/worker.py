"""The thread that owns the backbone: it alternates between decoding steps and scoring passes.

All passes run here, so that a single copy of the base needs no lock. Replies of a role share one `LiveBatch`; the batches of
several roles take turns, one step each. Scoring requests that wait are scored together, between steps.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from selfeval.errors import SelfEvalError
from selfeval.rollout.live import LiveBatch, NewToken, Ticket
from selfeval.rollout.requests import Request, Rollout
from selfeval.runs.conversations import AnyQuestion
from selfeval.serve.limits import Limits
from selfeval.serve.served_run import ServedRun

__all__ = ["Sampling", "Worker"]

R = TypeVar("R")

_LOG = logging.getLogger(__name__)
_TEXTS_PER_PASS = 64
"""Texts that are scored between two decoding steps, unless a single request has more."""


@dataclass(eq=False)
class Sampling:
    """A reply that waits, is being sampled, or has ended.

    The callbacks are called in the worker's thread, `on_end` or `on_error` once at most.

    Attributes:
        role: role that replies.
        request: prompt and sampling parameters.
        seed: seed of its random stream.
        limit: maximum number of new tokens.
        top: number of likeliest tokens to report.
        on_token, on_end, on_error: callbacks.
    """

    role: str
    request: Request
    seed: int
    limit: int
    top: int
    on_token: Callable[[NewToken], None] | None
    on_end: Callable[[Rollout], None]
    on_error: Callable[[Exception], None]
    ticket: Ticket | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)


@dataclass(frozen=True)
class _Scoring:
    """Texts to score, and the future of their scores."""

    questions: Sequence[AnyQuestion]
    replies: Sequence[str]
    future: Future[list[float]] = field(default_factory=Future)


class Worker:
    """Run decoding steps, scoring passes and other work on the backbone in one thread.

    Args:
        run: the models.
        limits: places of a batch, and tokens of a prompt with its reply.
    """

    def __init__(self, run: ServedRun, limits: Limits) -> None:
        self._run, self._limits = run, limits
        self._batches: dict[str, LiveBatch] = {}
        self._live: dict[str, set[Sampling]] = {role: set() for role in run.guides}
        self._changed = threading.Condition()
        self._work: deque[Callable[[], None]] = deque()
        self._scoring: deque[_Scoring] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="selfeval-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after the current step or pass; replies that are not finished never end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    # -- for other threads ----------------------------------------------------------------------------------------------

    def sample(self, sampling: Sampling) -> None:
        """Add a reply to the batch of its role."""
        self._put(lambda: self._add(sampling))

    def cancel(self, sampling: Sampling) -> None:
        """Remove a reply; harmless if it has ended."""
        self._put(lambda: self._remove(sampling))

    def score(self, questions: Sequence[AnyQuestion], replies: Sequence[str]) -> Future[list[float]]:
        """Score replies, one question each, in a pass that they may share with other requests."""
        waiting = _Scoring(questions, replies)
        with self._changed:
            self._scoring.append(waiting)
            self._changed.notify()
        return waiting.future

    def call(self, work: Callable[[], R]) -> Future[R]:
        """Call a function in the thread, between steps."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                _resolve(future, work)

        self._put(run)
        return future

    @property
    def running(self) -> int:
        """Number of replies that are being sampled."""
        return sum(batch.running for batch in tuple(self._batches.values()))

    @property
    def waiting(self) -> int:
        """Number of replies that wait for a place."""
        return sum(batch.waiting for batch in tuple(self._batches.values()))

    @property
    def scoring(self) -> int:
        """Number of scoring requests that wait."""
        return len(self._scoring)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches."""
        return sum(batch.cache_bytes for batch in tuple(self._batches.values()))

    def _put(self, work: Callable[[], None]) -> None:
        with self._changed:
            self._work.append(work)
            self._changed.notify()

    # -- in the thread --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._work or self._scoring or self._stopping or any(self._live.values())):
                    self._changed.wait()
                if self._stopping:
                    return
                work, self._work = self._work, deque()
                scoring = self._next_scoring()
            for one in work:
                _guarded(one)
            self._score(scoring)
            for role, live in self._live.items():
                if live:
                    self._step(role)

    def _add(self, sampling: Sampling) -> None:
        if sampling.cancelled:
            return
        live = self._live[sampling.role]

        def ended(rollout: Rollout) -> None:
            live.discard(sampling)
            sampling.on_end(rollout)

        def failed(error: Exception) -> None:
            live.discard(sampling)
            sampling.on_error(error)

        live.add(sampling)
        try:
            sampling.ticket = self._batch(sampling.role).add(
                sampling.request,
                seed=sampling.seed,
                limit=sampling.limit,
                top=sampling.top,
                on_token=sampling.on_token,
                on_end=ended,
                on_error=failed,
            )
        except Exception as error:  # reported to the client; the thread must continue
            _log(error)
            failed(error)

    def _batch(self, role: str) -> LiveBatch:
        """Return the batch of a role, made when it is first used: its cache is allocated once."""
        if role not in self._batches:
            limits, context = self._limits, self._run.context
            most = limits.prompt_tokens + limits.reply_tokens
            self._batches[role] = LiveBatch(
                self._run.model.backbone,
                role,
                places=limits.places,
                max_tokens=most if context is None else min(most, context),
                guide=self._run.guides[role],
                # Thinking has no separate limit: `max_tokens` bounds all tokens, as in OpenAI's API.
                thinking=self._run.model.templates.thinking(),
            )
        return self._batches[role]

    def _remove(self, sampling: Sampling) -> None:
        sampling.cancelled = True
        self._live[sampling.role].discard(sampling)
        if sampling.ticket is not None and sampling.role in self._batches:
            self._batches[sampling.role].cancel(sampling.ticket)

    def _step(self, role: str) -> None:
        try:
            self._batches[role].step()
        except Exception as error:  # every reply of the batch ends with the error; the next request begins a new batch
            _log(error)
            failed = tuple(self._live[role])
            self._live[role].clear()
            self._batches.pop(role, None)
            for sampling in failed:
                sampling.on_error(error)

    def _next_scoring(self) -> list[_Scoring]:
        """Take scoring requests for one pass: at least one, and more while their texts fit."""
        taken: list[_Scoring] = []
        while self._scoring:
            texts = sum(len(one.replies) for one in (*taken, self._scoring[0]))
            if taken and texts > _TEXTS_PER_PASS:
                break
            taken.append(self._scoring.popleft())
        return taken

    def _score(self, scoring: Sequence[_Scoring]) -> None:
        asked = [one for one in scoring if one.future.set_running_or_notify_cancel()]
        if not asked:
            return
        try:
            scores = iter(self._scores(asked))
        except Exception as error:  # one request at a time, so that each receives its own result or error
            if len(asked) == 1:
                _log(error)
                asked[0].future.set_exception(error)
                return
            for one in asked:
                _resolve(one.future, lambda one=one: self._scores([one]))  # type: ignore[misc]
            return
        for one in asked:
            one.future.set_result([next(scores) for _ in one.replies])

    def _scores(self, asked: Sequence[_Scoring]) -> list[float]:
        evaluator = self._run.evaluator
        assert evaluator is not None, "the endpoints that score are refused without an evaluator"
        return evaluator.score([q for one in asked for q in one.questions], [r for one in asked for r in one.replies])


def _guarded(work: Callable[[], None]) -> None:
    """Call a function; the thread must outlive its bugs."""
    try:
        work()
    except Exception as error:
        _log(error)


def _resolve(future: Future[R], work: Callable[[], R]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # the caller receives it
        _log(error)
        future.set_exception(error)


def _log(error: Exception) -> None:
    """Log the traceback of a bug; errors of this package on purpose are the client's."""
    if not isinstance(error, SelfEvalError):
        _LOG.error("error in the worker", exc_info=error)
