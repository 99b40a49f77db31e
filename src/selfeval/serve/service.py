"""State shared by the endpoints: the run, its worker, the limits, and the admission of work."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from selfeval.prompt import Prompt
from selfeval.runs.conversations import AnyQuestion
from selfeval.runs.evaluator import Evaluator
from selfeval.serve.api_errors import ApiError
from selfeval.serve.limits import Limits
from selfeval.serve.metrics import Metrics
from selfeval.serve.served_run import SCORER, ServedRun
from selfeval.serve.worker import Worker
from selfeval.texts import safe_json, shortened

__all__ = ["Service", "service_of"]

R = TypeVar("R")

_LONGEST_WAIT = 60
"""Maximum seconds in Retry-After."""


@dataclass
class Service:
    """State shared by the endpoints.

    Attributes:
        run, worker, limits, metrics: see their classes.
        created: when the server was started, in seconds since 1970.
        rows: replies that are sampled or wait.
        scorings: scoring requests that run or wait.
        typical_seconds: moving average of the time that an admitted request took.
    """

    run: ServedRun
    worker: Worker
    limits: Limits
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    rows: int = 0
    scorings: int = 0
    typical_seconds: float = 1.0
    # A single thread, so that long texts take one core from the models at most.
    _tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "selfeval-tokenizer"), init=False, repr=False
    )

    # -- models ---------------------------------------------------------------------------------------------------------

    def check_replier(self, name: str) -> str:
        """Return the name of a role that replies.

        Raises:
            ApiError: 404, there is no such model, or it does not reply.
        """
        if name in self.run.guides:
            return name
        problem = "scores and does not reply" if name == SCORER and self.run.evaluator else "does not exist"
        raise self._no_model(name, problem, list(self.run.guides))

    def check_scorer(self, name: str | None) -> Evaluator:
        """Return the evaluator.

        Args:
            name: the model of the request; None: it names none.

        Raises:
            ApiError: 501, the run has no evaluator; 404, the model is another one.
        """
        if self.run.evaluator is None:
            raise ApiError(
                501,
                "this run has no evaluator, which the request needs; finish the stage evaluator (`selfeval run`), then restart "
                "the server",
                "no_evaluator",
            )
        if name not in (None, SCORER):
            raise self._no_model(str(name), "is not the evaluator", [SCORER])
        return self.run.evaluator

    def check_embedder(self, name: str, base: str) -> None:
        """Refuse a model other than the base.

        Raises:
            ApiError: 404.
        """
        if name != base:
            raise self._no_model(name, "does not embed", [base])

    def _no_model(self, name: str, problem: str, allowed: list[str]) -> ApiError:
        message = f"the model {shortened(safe_json(name))} {problem}; models for this endpoint: {', '.join(allowed)}"
        return ApiError(404, message, "model_not_found", param="model")

    # -- limits ---------------------------------------------------------------------------------------------------------

    def check_count(self, name: str, count: int, most: int, option: str) -> None:
        """Refuse more items than a limit.

        Raises:
            ApiError: 400.
        """
        if count > most:
            raise ApiError(400, f"{name}: got {count:,}, the limit is {most:,} ({option})", "too_many", param=name)

    def check_tokens(self, name: str, ids: tuple[int, ...] | list[int]) -> None:
        """Refuse a text that is too long for a prompt.

        Raises:
            ApiError: 400.
        """
        if len(ids) > self.limits.prompt_tokens:
            message = f"{name} has {len(ids):,} tokens, the limit is {self.limits.prompt_tokens:,} (--max-prompt-tokens)"
            raise ApiError(400, message, "context_length_exceeded", param=name)

    def check_characters(self, name: str, *texts: str) -> None:
        """Refuse a text that has more tokens than a prompt may have, whatever they are, before it is tokenized.

        Raises:
            ApiError: 400.
        """
        tokens, characters = self.limits.prompt_tokens, max(map(len, texts), default=0)
        if characters > (most := tokens * self.run.longest_token):
            message = f"{name} has {characters:,} characters, but {tokens:,} tokens (--max-prompt-tokens) have at most {most:,}"
            raise ApiError(400, message, "context_length_exceeded", param=name)

    async def tokenized(self, work: Callable[[], R]) -> R:
        """Call a function that tokenizes in a separate thread, so that long texts do not delay other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    def reply_tokens(self, name: str, prompt: Prompt, wanted: int | None) -> int:
        """Return the token limit of a reply to a prompt.

        Args:
            name: parameter that holds the prompt.
            prompt: the prompt.
            wanted: the limit of the request; None: that of the run's replies with their thinking, or the room in the context.

        Raises:
            ApiError: 400, the prompt is too long, or the limit is too high.
        """
        self.check_tokens(name, prompt.ids)
        most, context = self.limits.reply_tokens, self.run.context
        if wanted is not None:
            self.check_count("max_tokens", wanted, most, "--max-tokens")
        room = most if context is None else context - len(prompt.ids)
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and max_tokens is {wanted:,}"
            raise ApiError(
                400,
                f"the prompt has {len(prompt.ids):,} tokens{asked}, but the context of this model is {context:,}; shorten the "
                "messages or lower max_tokens",
                "context_length_exceeded",
                param=name,
            )
        return min(self.run.reply_limit or most, most, room) if wanted is None else wanted

    # -- admission ------------------------------------------------------------------------------------------------------

    @contextmanager
    def admitted(self, *, rows: int = 0, scorings: int = 0) -> Iterator[None]:
        """Count work inside the block. Reference answers that scoring requests wait for take places too.

        Raises:
            ApiError: 429, the queue is full.
        """
        taken = self.rows + self.worker.reference_answers
        if taken + rows > self.limits.rows or self.scorings + scorings > self.limits.scorings:
            wait = min(_LONGEST_WAIT, max(1, math.ceil(self.typical_seconds)))
            message = f"the queue is full ({self.limits.queue:,} requests, --queue); retry after {wait} s"
            raise ApiError(429, message, "queue_full", headers={"Retry-After": str(wait)})
        self.rows, self.scorings, begun = self.rows + rows, self.scorings + scorings, time.monotonic()
        try:
            yield
        finally:
            self.rows, self.scorings = self.rows - rows, self.scorings - scorings
            self.typical_seconds += 0.1 * (time.monotonic() - begun - self.typical_seconds)

    # -- scores ---------------------------------------------------------------------------------------------------------

    async def scores(self, questions: Sequence[AnyQuestion], replies: Sequence[str]) -> list[float]:
        """Score replies, one question each."""
        return await asyncio.wrap_future(self.worker.score(questions, replies))


def service_of(request: Request) -> Service:
    """Return the service of the application that received a request."""
    found: Service = request.app.state.service
    return found
