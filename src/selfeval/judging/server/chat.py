"""A request to a chat-completions server, and the part of the answer that a judge reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selfeval.judging.labels import Labels
from selfeval.judging.turns import Turn

__all__ = ["Answer", "ChatRequest", "Ending", "Token"]

Ending = Literal["stop", "cut", "refused", "no_room"]
"""How an answer ended: by itself, at its token limit, as a refusal of the server's filter or the model, or not at all, because
the prompt does not fit the model's context."""


@dataclass(frozen=True)
class ChatRequest:
    """A request.

    Attributes:
        turns: the conversation.
        labels: words of the verdict that is read in the answer.
        limit: token limit of the answer.
        temperature: sampling temperature. Default: 0.
        logprobs: number of alternatives per token whose log-probs are requested; 0 requests none. Default: 0.
        draw: name of the sample among equal requests, such as the number of a vote. Default: empty.
    """

    turns: tuple[Turn, ...]
    labels: Labels
    limit: int
    temperature: float = 0.0
    logprobs: int = 0
    draw: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation in the form of the protocol."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns]

    def parameters(self, limit_parameter: str) -> dict[str, Any]:
        """Return the sampling parameters in the form of the protocol."""
        values: dict[str, Any] = {limit_parameter: self.limit, "temperature": self.temperature}
        return values | ({"logprobs": True, "top_logprobs": self.logprobs} if self.logprobs else {})

    @property
    def identity(self) -> list[Any]:
        """Everything that the kept answer depends on, besides server, model and parameters."""
        return [self.messages, [self.labels.lead, *self.labels.all], self.draw]


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: its text.
        alternatives: log-probs of the likeliest tokens at its position, by text.
    """

    text: str
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class Answer:
    """The part of an answer that a judge reads.

    Attributes:
        text: the answer.
        ending: how it ended.
        read, written: prompt and completion tokens, as the server counts them; None if it does not say.
        has_logprobs: whether the server returned the log-probs of the text, if there is any. Default: False.
        at_verdict: Optional. Log-probs of the likeliest tokens where the label of the verdict begins, by text. Default: none.
    """

    text: str
    ending: Ending
    read: int | None
    written: int | None
    has_logprobs: bool = False
    at_verdict: Mapping[str, float] | None = None
