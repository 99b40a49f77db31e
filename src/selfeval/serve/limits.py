"""Limits of the server, with the command-line option that changes each of them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Limits of a single request, and of all requests together.

    Attributes:
        body_bytes: bytes of a request body (`--max-body-bytes`).
        prompt_tokens: tokens of a prompt, or of a text that is scored or embedded (`--max-prompt-tokens`).
        reply_tokens: tokens of a reply (`--max-tokens`).
        n: replies to one prompt, `n` and `best_of` (`--max-n`).
        texts: prompts, replies, documents or inputs of a request (`--max-texts`).
        places: replies that are sampled at a time, for each role (`--places`).
        queue: replies that wait for a place, reference answers among them, and scoring requests that wait for the one that runs
            (`--queue`).
    """

    body_bytes: int = 4 << 20
    prompt_tokens: int = 2048
    reply_tokens: int = 1024
    n: int = 16
    texts: int = 256
    places: int = 8
    queue: int = 128

    @property
    def rows(self) -> int:
        """The most replies that are sampled or wait at a time."""
        return self.places + self.queue

    @property
    def scorings(self) -> int:
        """The most scoring requests that run, which one does at a time, or wait."""
        return 1 + self.queue
