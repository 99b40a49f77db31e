"""Requests for replies and the replies that were sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from selfeval.errors import InputError
from selfeval.prompt import Prompt
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens

__all__ = ["Request", "Rollout"]


@dataclass(frozen=True)
class Request:
    """A request for one reply: prompt and sampling parameters.

    Attributes:
        prompt: the prompt.
        temperature: of the distribution, >= 0; 0 is greedy. Default: 1.
        top_p: probability of the nucleus (Holtzman et al. 2020), in (0, 1]. Default: 1 (off).
        stream: Optional. Number of its random stream, from 0 to 2**64 - 1. Default: its index among the requests.
        top_k: number of tokens to sample from, the likeliest ones; 0: all. Default: 0.
        min_p: least probability of a token, as a share of that of the likeliest (Nguyen et al. 2024), in [0, 1]. Default: 0.
        repetition_penalty: divisor of the positive logits of tokens that prompt or reply have already, and factor of the
            negative ones (Keskar et al. 2019), > 0. Default: 1 (off).
        stop_strings: texts that end the reply; the token that completes one is its last. Default: none.
        limit: Optional. Maximum number of new tokens of this reply, >= 1, if lower than that of `generate`. Default: the same.

    Raises:
        InputError: a parameter is out of its range.
    """

    prompt: Prompt
    temperature: float = 1.0
    top_p: float = 1.0
    stream: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        # Written so that NaN is refused, which is in no range.
        for name, allowed, rule in (
            ("temperature", 0 <= self.temperature < math.inf, "must be a number of at least 0; 0 is greedy"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1; 1 keeps all tokens"),
            ("top_k", self.top_k >= 0, "must be at least 0; 0 keeps all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1; 0 keeps all tokens"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be a number above 0; 1 changes nothing"),
            ("limit", self.limit is None or self.limit >= 1, "must be at least 1 token, or None"),
            ("stream", self.stream is None or 0 <= self.stream < 2**64, "must be from 0 to 2**64 - 1, or None"),
            ("stop_strings", all(self.stop_strings), "none may be empty"),
        ):
            if not allowed:
                raise InputError(f"{name}={getattr(self, name)!r}: {rule}")

    def most(self, limit: int) -> int:
        """Return the maximum number of new tokens under the limit of all replies."""
        return limit if self.limit is None else min(limit, self.limit)


@dataclass(frozen=True)
class Rollout:
    """One sampled reply.

    Attributes:
        ids: sampled tokens, including the end-of-sequence token.
        logprobs: log-prob of each token in nats at the sampling temperature (1 if greedy), before filters (top-k, top-p,
            min-p) and repetition penalty; under the guided distribution if a guide was used.
        finished: whether an end-of-sequence token or a stop string was sampled before the limit.
        watched: log-probs of the watched tokens at temperature 1 for each step, `[T][W]`; empty by default.
        hidden: number of leading tokens that are thinking, markers included. Default: 0.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool
    watched: tuple[tuple[float, ...], ...] = ()
    hidden: int = 0

    @property
    def thinking_ids(self) -> tuple[int, ...]:
        """The tokens that judge and evaluator do not read."""
        return self.ids[: self.hidden]

    @property
    def reply_ids(self) -> tuple[int, ...]:
        """The tokens after the thinking; empty if the reply was cut off in it."""
        return self.ids[self.hidden :]

    def within(self, limit: int, prompt: Prompt, thinking: ThinkingTokens | None = None) -> Rollout:
        """Return the rollout that the same random numbers give with these limits, which are not higher than its own were.

        Args:
            limit: maximum number of tokens of the reply.
            prompt: prompt of the reply.
            thinking: Optional. Markers and limit of the thinking. Default: none is recognised.
        """
        progress = ReplyProgress(limit, len(self.ids), prompt, thinking)
        for token in self.ids:
            progress.add(token)
            if progress.length >= progress.limit:
                break
        kept = progress.length
        finished = self.finished and kept == len(self.ids)
        hidden = progress.hidden(finished=finished)
        return Rollout(self.ids[:kept], self.logprobs[:kept], finished, self.watched[:kept], hidden)
