"""A reply as the parts of a response: its text, the log-probs of the tokens that are shown, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.judging.templates import Templates
from selfeval.prompt import Prompt
from selfeval.rollout.live import NewToken
from selfeval.rollout.requests import Rollout
from selfeval.rollout.thinking import ReplyProgress, ThinkingTokens
from selfeval.serve.replies import SampledReply
from selfeval.serve.served_run import ServedRun
from selfeval.serve.text_stream import GrowingText, TextStream

__all__ = ["Piece", "ReplyText", "token_text"]


@dataclass(frozen=True)
class Piece:
    """Text to send, and the positions of its tokens in the reply.

    Attributes:
        text: the text; may be empty.
        tokens: positions of the tokens that it completes; empty unless log-probs are sent.
    """

    text: str
    tokens: tuple[int, ...] = ()


class ReplyText:
    """Turn the tokens of one reply into text, as they arrive or at the end.

    For a chat the thinking is left out, and white space around the reply is removed, as in `Policy.reply`. If the model closes
    a thinking that it did not open, a stream has sent the text before the marker already; it begins again after it.

    Args:
        run: the models.
        prompt: prompt of the reply.
        limit: maximum number of tokens.
        stop_strings: texts that end the reply.
        chat: whether the reply is that of a chat, not the continuation of a text.
        with_tokens: whether the positions of tokens are needed, for log-probs.
    """

    def __init__(
        self, run: ServedRun, prompt: Prompt, limit: int, stop_strings: Sequence[str], *, chat: bool, with_tokens: bool
    ) -> None:
        self._run, self._stop_strings, self._chat, self._with_tokens = run, stop_strings, chat, with_tokens
        self._templates: Templates = run.model.templates
        self._thinking: ThinkingTokens | None = self._templates.thinking() if chat else None
        self._progress = ReplyProgress(limit, limit, prompt, self._thinking)
        self.reply = SampledReply()
        self._begin(0)

    def _begin(self, hidden: int) -> None:
        self._hidden, self._shown = hidden, hidden
        self._stream = TextStream(self._text, self._stop_strings, strip=self._chat)
        self._prefixes, self._lengths = GrowingText(self._text), [(0, 0)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._templates.tokenizer.decode(self._templates.control.without_special(ids)))

    def add(self, token: NewToken) -> Piece:
        """Add a token; return what can be sent now."""
        self.reply.add(token)
        self._progress.add(token.id)
        if self._progress.is_open:
            return Piece("")
        if (hidden := self._progress.hidden(finished=False)) != self._hidden:
            self._begin(hidden)
        text = self._stream.piece(self.reply.ids[self._hidden :])
        return Piece(text, self._complete() if text else ())

    def _complete(self) -> tuple[int, ...]:
        """Return the tokens that were not sent yet and whose text was."""
        begin = self._shown
        while self._with_tokens and self._shown < len(self.reply.ids):
            if self._length(self._shown + 1)[self._chat] > self._stream.sent:
                break
            self._shown += 1
        return self._visible(range(begin, self._shown))

    def end(self, rollout: Rollout) -> Piece:
        """Return what is left to send at the end of the reply."""
        self.reply.rollout = rollout
        if not self.reply.ids:
            self.reply.ids, self.reply.logprobs = list(rollout.ids), list(rollout.logprobs)
        hidden = rollout.hidden if self._chat else 0
        if hidden != self._hidden:
            self._begin(hidden)
        # An end-of-sequence token or a stop string ended the reply; otherwise the limit cut it off.
        text = self._stream.rest(rollout.ids[hidden:], finished=rollout.finished)
        if not self._with_tokens:
            return Piece(text)
        kept = self.reply.kept(self._stop_strings, self._run.model.backbone.loaded)
        return Piece(text, self._visible(range(self._shown, kept)))

    def _visible(self, positions: range) -> tuple[int, ...]:
        special = self._templates.control.special_ids
        return tuple(i for i in positions if self.reply.ids[i] not in special)

    def offset(self, position: int) -> int:
        """Return the number of characters of the reply before a token."""
        return self._length(position)[0]

    def _length(self, position: int) -> tuple[int, int]:
        """Return the number of characters before a position, and that without white space around them."""
        while len(self._lengths) <= position - self._hidden:
            text = self._prefixes.of(self.reply.ids[self._hidden : self._hidden + len(self._lengths)])
            self._lengths.append((len(text), len(text.strip())))
        return self._lengths[position - self._hidden]

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`."""
        # Without special tokens, which the engine decodes, a text may contain a stop string that the engine did not find.
        return "stop" if self.reply.ended.finished or self._stream.stopped else "length"

    @property
    def reasoning(self) -> str:
        """The thinking before the reply; empty without one."""
        return self._templates.thinking_text(self.reply.ended.thinking_ids) if self._chat else ""


def token_text(run: ServedRun, token: int) -> dict[str, Any]:
    """Return the text of a token and its bytes; the bytes are None if it is a part of a character."""
    text = run.token_texts[token]
    return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode())}
