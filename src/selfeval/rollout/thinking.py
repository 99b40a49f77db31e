"""Thinking before a reply: recognised by its marker tokens while the reply is sampled, and limited separately.

The sampled tokens are never changed: a chain of thought that reaches its limit ends the reply, which then has no visible part.
Closing it with a forced token instead would put tokens into the reply that the policy did not sample, and their log-probs would
enter the importance ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfeval.prompt import Prompt

__all__ = ["ReplyProgress", "ThinkingTokens"]

_TAIL = 4
"""Number of last tokens of a prompt searched for an opening marker; a chat template may write it, and line breaks after it."""


@dataclass(frozen=True)
class ThinkingTokens:
    """The tokens that begin and end a chain of thought, and its limit.

    Attributes:
        opening, closing: ids of the markers.
        limit: maximum number of tokens of the thinking. None: thinking and reply share one limit.
    """

    opening: frozenset[int]
    closing: frozenset[int]
    limit: int | None = None

    def opened_by(self, prompt: Prompt) -> bool:
        """Return whether the prompt ends inside a chain of thought."""
        marks = [i in self.opening for i in prompt.ids[-_TAIL:] if i in self.opening or i in self.closing]
        return bool(marks) and marks[-1]


class ReplyProgress:
    """A reply while it is sampled: where its thinking ends, and at which length it is cut off.

    Args:
        limit: maximum number of tokens of the reply, without a chain of thought that has its own limit.
        room: maximum number of all tokens.
        prompt: the prompt of the reply.
        thinking: Optional. Markers and limit of the thinking. Default: nothing is recognised.

    Attributes:
        length: number of tokens so far.
        limit: length at which the reply is cut off, as far as its tokens so far show.
        most: the largest value that `limit` can take.
    """

    def __init__(self, limit: int, room: int, prompt: Prompt, thinking: ThinkingTokens | None = None) -> None:
        self._thinking, self._reply_limit = thinking, limit
        self._thinking_limit = None if thinking is None else thinking.limit
        self.most = min(limit + (self._thinking_limit or 0), room)
        self.length, self.limit = 0, min(limit, room)
        self._hidden, self._is_open = 0, False
        if thinking is not None and thinking.opened_by(prompt):
            self._open()

    def add(self, token: int) -> None:
        """Add a sampled token."""
        self.length += 1
        if self._thinking is None:
            return
        # A closing marker counts without an opening one, and an opening marker inside a thinking block does not.
        if token in self._thinking.closing:
            self._hidden, self._is_open = self.length, False
            self._allow(self._reply_limit)
        elif token in self._thinking.opening and not self._is_open:
            self._open()

    def _open(self) -> None:
        self._is_open = True
        self._allow(self._thinking_limit or 0)

    def _allow(self, more: int) -> None:
        if self._thinking_limit is not None:
            self.limit = min(self.length + more, self.most)

    def hidden(self, *, finished: bool) -> int:
        """Return the number of leading tokens that are thinking.

        Args:
            finished: whether the last token is an end-of-sequence token, which is never part of the thinking.
        """
        return self.length - finished if self._is_open else self._hidden
