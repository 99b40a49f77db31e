"""The thread that owns the backbone: it alternates between decoding steps and scoring passes.

All passes run here, so that a single copy of the base needs no lock. Replies of a role share one `LiveBatch`; the batches of
several roles take turns, one step each. Scoring requests that wait are scored together, between steps; the reference answers
that they need are sampled before, in the batch of the base. Large requests are split, so that others need not wait for all of
their texts, and end early if their client has left.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

from selfeval.errors import SelfEvalError
from selfeval.rollout.drafts import DraftCounts, Speculation
from selfeval.rollout.live import LiveBatch
from selfeval.rollout.requests import Rollout
from selfeval.runs.conversations import AnyQuestion
from selfeval.serve.limits import Limits
from selfeval.serve.reference_answers import ReferenceAnswers
from selfeval.serve.sampling import Sampling
from selfeval.serve.served_run import ServedRun

__all__ = ["Worker"]

R = TypeVar("R")

_LOG = logging.getLogger(__name__)
_TEXTS_PER_PASS = 64
"""Texts that are scored between two decoding steps."""


@dataclass(eq=False)
class _Scoring:
    """Texts to score, the future of their scores, and the scores so far."""

    questions: Sequence[AnyQuestion]
    replies: Sequence[str]
    future: Future[list[float]] = field(default_factory=Future)
    scores: list[float] = field(default_factory=list)

    @property
    def part(self) -> slice:
        """The texts of the next pass."""
        return slice(len(self.scores), min(len(self.replies), len(self.scores) + _TEXTS_PER_PASS))


class _Steps:
    """Work in one or several steps, and the future of their results; if it is cancelled, no further step is done."""

    def __init__(self, steps: Sequence[Callable[[], Any]]) -> None:
        self._steps, self._results = deque(steps), list[Any]()
        self.future: Future[Any] = Future()

    def advance(self) -> bool:
        """Do the next step; return whether the work continues."""
        if self.future.cancelled():
            return False
        try:
            self._results.append(self._steps.popleft()())
        except Exception as error:  # the caller receives it
            _log(error)
            _settle(self.future, error=error)
            return False
        if not self._steps:
            _settle(self.future, self._results)
        return bool(self._steps)


class Worker:
    """Run decoding steps, scoring passes and other work on the backbone in one thread.

    Args:
        run: the models.
        limits: places of a batch, and tokens of a prompt with its reply.
        speculation: when drafts of the next tokens are read, as in `LiveBatch`. Default: `auto`.

    Attributes:
        drafts: number of drafted tokens since the start, and of those that were correct.
    """

    def __init__(self, run: ServedRun, limits: Limits, speculation: Speculation = Speculation.AUTO) -> None:
        self._run, self._limits, self._speculation = run, limits, speculation
        self.drafts = DraftCounts()
        self._batches: dict[str, LiveBatch] = {}
        self._live: dict[str, set[Sampling]] = {role: set() for role in run.guides}
        self._changed = threading.Condition()
        self._work: deque[Callable[[], None]] = deque()
        self._steps: deque[_Steps] = deque()
        self._scoring: deque[_Scoring] = deque()
        self._unanswered: set[_Scoring] = set()
        self._answers = ReferenceAnswers(run, self._room, self._add, self._remove)
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
        self._put(lambda: self._prepare(waiting))
        return waiting.future

    def call(self, steps: Sequence[Callable[[], R]]) -> Future[list[R]]:
        """Call functions in the thread, one between two decoding steps, and return their results."""
        waiting = _Steps(steps)
        with self._changed:
            self._steps.append(waiting)
            self._changed.notify()
        return waiting.future

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
        return len(self._scoring) + len(self._unanswered)

    @property
    def reference_answers(self) -> int:
        """Number of reference answers for scoring requests that are being sampled or wait for a place."""
        return self._answers.count

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
                while not (self._work or self._steps or self._scoring or self._stopping or any(self._live.values())):
                    self._changed.wait()
                if self._stopping:
                    return
                work, self._work = self._work, deque()
                steps = self._steps.popleft() if self._steps else None
            for one in work:
                _guarded(one)
            if steps is not None and steps.advance():
                with self._changed:
                    self._steps.append(steps)  # after the others, so that a large one does not delay a small one
            self._score(self._next_scoring())
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
                thinks=sampling.thinks,
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
            self._batches[role] = LiveBatch(
                self._run.model.backbone,
                role,
                places=self._limits.places,
                max_tokens=self._room,
                guide=self._run.guides[role],
                # Thinking has no separate limit: `max_tokens` bounds all tokens, as in OpenAI's API.
                thinking=self._run.model.templates.thinking(),
                speculation=self._speculation,
                drafts=self.drafts,
            )
        return self._batches[role]

    @property
    def _room(self) -> int:
        """Tokens of a prompt with its reply in a batch."""
        most, context = self._limits.prompt_tokens + self._limits.reply_tokens, self._run.context
        return most if context is None else min(most, context)

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

    def _prepare(self, scoring: _Scoring) -> None:
        """Let a scoring request wait for its reference answers, then for a pass."""

        def answered(error: Exception | None) -> None:
            self._unanswered.discard(scoring)
            if error is not None:
                _settle(scoring.future, error=error)
            else:
                self._scoring.append(scoring)

        self._unanswered.add(scoring)
        try:
            leave = self._answers.need(scoring.questions, answered)
            scoring.future.add_done_callback(lambda future: self._put(lambda: self._settled(scoring, leave)))
        except Exception as error:  # a malformed question; the caller receives it
            _log(error)
            answered(error)

    def _settled(self, scoring: _Scoring, leave: Callable[[], None]) -> None:
        """Let go of the answers that a request whose client has left still waits for; harmless after its end."""
        self._unanswered.discard(scoring)
        leave()

    def _next_scoring(self) -> list[_Scoring]:
        """Take scoring requests for one pass: at least one, and more while their texts fit."""
        taken, texts = list[_Scoring](), 0
        while self._scoring:
            part = self._scoring[0].part
            texts += part.stop - part.start
            if taken and texts > _TEXTS_PER_PASS:
                break
            taken.append(self._scoring.popleft())
        return taken

    def _score(self, scoring: Sequence[_Scoring]) -> None:
        asked = [one for one in scoring if not one.future.cancelled()]
        if not asked:
            return
        try:
            scores = iter(self._scores(asked))
        except Exception as error:
            if len(asked) == 1:
                _log(error)
                _settle(asked[0].future, error=error)
                return
            for one in asked:  # one request at a time, so that each receives its own result or error
                self._score([one])
            return
        for one in asked:
            part = one.part
            one.scores += [next(scores) for _ in one.replies[part]]
            if part.stop == len(one.replies):
                _settle(one.future, one.scores)
        self._scoring.extendleft(reversed([one for one in asked if len(one.scores) < len(one.replies)]))

    def _scores(self, asked: Sequence[_Scoring]) -> list[float]:
        evaluator = self._run.evaluator
        assert evaluator is not None, "the endpoints that score are refused without an evaluator"
        return evaluator.score(
            [q for one in asked for q in one.questions[one.part]], [r for one in asked for r in one.replies[one.part]]
        )


def _guarded(work: Callable[[], None]) -> None:
    """Call a function; the thread must outlive its bugs."""
    try:
        work()
    except Exception as error:
        _log(error)


def _settle(future: Future[R], result: R | None = None, error: Exception | None = None) -> None:
    """Give a future its result or error, unless it was cancelled: it is pending until then, so that it can be."""
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(cast(R, result))


def _log(error: Exception) -> None:
    """Log the traceback of a bug; errors of this package on purpose are the client's."""
    if not isinstance(error, SelfEvalError):
        _LOG.error("error in the worker", exc_info=error)
