"""A reply that the worker samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from selfeval.rollout.live import NewToken, Ticket
from selfeval.rollout.requests import Request, Rollout

__all__ = ["Sampling"]


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
        thinks: whether a chain of thought is recognized.
        on_token, on_end, on_error: callbacks.
    """

    role: str
    request: Request
    seed: int
    limit: int
    top: int
    thinks: bool
    on_token: Callable[[NewToken], None] | None
    on_end: Callable[[Rollout], None]
    on_error: Callable[[Exception], None]
    ticket: Ticket | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)
