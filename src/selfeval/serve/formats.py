"""Responses in the formats of OpenAI's two endpoints that reply: whole choices, and the choices of a stream's chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from selfeval.serve.reply_text import Piece, ReplyText, token_text
from selfeval.serve.served_run import ServedRun

__all__ = ["ChatFormat", "CompletionFormat", "Format"]


class Format(Protocol):
    """Format of the choices of an endpoint.

    Attributes:
        kind, chunk_kind: `object` of a response and of a chunk.
        prefix: beginning of the ids of responses.
    """

    kind: str
    chunk_kind: str
    prefix: str

    def choice(self, reply: ReplyText, piece: Piece) -> dict[str, Any]:
        """Return a whole choice without its index and finish reason."""
        ...

    def first(self) -> dict[str, Any] | None:
        """Return the choice of the first chunk, which has no text; None if there is none."""
        ...

    def part(self, reply: ReplyText, piece: Piece) -> dict[str, Any]:
        """Return the choice of a chunk with a piece of text."""
        ...

    def last(self) -> dict[str, Any]:
        """Return the choice of the chunk with the finish reason."""
        ...


class ChatFormat:
    """Format of `/v1/chat/completions`.

    Args:
        run: the models.
        top: number of alternatives for each token; None: no log-probs.
    """

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, run: ServedRun, top: int | None) -> None:
        self._run, self._top = run, top

    def choice(self, reply: ReplyText, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if reasoning := reply.reasoning:
            message["reasoning_content"] = reasoning
        return {"message": message, "logprobs": self._logprobs(reply, piece.tokens)}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, reply: ReplyText, piece: Piece) -> dict[str, Any]:
        return {"delta": {"content": piece.text}, "logprobs": self._logprobs(reply, piece.tokens)}

    def last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, reply: ReplyText, positions: Sequence[int]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        return {"content": [self._token(reply, position) for position in positions], "refusal": None}

    def _token(self, reply: ReplyText, position: int) -> dict[str, Any]:
        sampled, tops = reply.reply, reply.reply.tops[position] if self._top else ()
        return {
            **token_text(self._run, sampled.ids[position]),
            "logprob": sampled.logprobs[position],
            "top_logprobs": [{**token_text(self._run, token), "logprob": logprob} for token, logprob in tops],
        }


class CompletionFormat:
    """Format of `/v1/completions`; see `ChatFormat`."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, run: ServedRun, top: int | None) -> None:
        self._run, self._top = run, top

    def choice(self, reply: ReplyText, piece: Piece) -> dict[str, Any]:
        return self.part(reply, piece)

    def first(self) -> dict[str, Any] | None:
        return None

    def part(self, reply: ReplyText, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text, "logprobs": self._logprobs(reply, piece.tokens)}

    def last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, reply: ReplyText, positions: Sequence[int]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        sampled = reply.reply
        return {
            "tokens": [self._name(sampled.ids[i]) for i in positions],
            "token_logprobs": [sampled.logprobs[i] for i in positions],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in sampled.tops[i]} if self._top else {} for i in positions
            ],
            "text_offset": [reply.offset(i) for i in positions],
        }

    def _name(self, token: int) -> str:
        return self._run.token_texts[token]
