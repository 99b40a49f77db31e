"""Thinking before a reply: recognised by its markers of one or several tokens while it is sampled, and limited separately.

The sampled tokens are never changed: a chain of thought that reaches its limit ends the reply, which then has no visible part.
Closing it with a forced token instead would put tokens into the reply that the policy did not sample, and their log-probs would
enter the importance ratio.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from selfeval.prompt import Prompt

__all__ = ["ReplyProgress", "ThinkingTokens"]

_TAIL = 4
"""Number of last tokens of a prompt, without an opening marker itself, that are searched for one; a chat template may write it,
and line breaks after it."""

Markers = frozenset[int | tuple[int, ...]]
"""Markers, each a token or a sequence of tokens."""


@dataclass(frozen=True)
class ThinkingTokens:
    """The tokens that begin and end a chain of thought, and its limit.

    Attributes:
        opening, closing: the markers; each is the id of a token, or the ids of several (`<|channel|>analysis` of harmony).
        limit: maximum number of tokens of the thinking. None: thinking and reply share one limit.
    """

    opening: Markers
    closing: Markers
    limit: int | None = None

    def opened_by(self, prompt: Prompt) -> bool:
        """Return whether the prompt ends inside a chain of thought."""
        tail = prompt.ids[-_TAIL - self.longest + 1 :]
        marks = [is_opening for end in range(1, len(tail) + 1) if (is_opening := self.mark_at(tail[:end])) is not None]
        return bool(marks) and marks[-1]

    @cached_property
    def longest(self) -> int:
        """Number of tokens of the longest marker."""
        return max((len(_sequence(marker)) for marker in self.opening | self.closing), default=1)

    def mark_at(self, ids: Sequence[int]) -> bool | None:
        """Return whether the marker that ends the ids is an opening one; None if no marker ends them."""
        for is_opening, markers in ((False, self.closing), (True, self.opening)):
            if any(tuple(ids[-len(marker) :]) == marker for marker in map(_sequence, markers)):
                return is_opening
        return None


def _sequence(marker: int | tuple[int, ...]) -> tuple[int, ...]:
    return (marker,) if isinstance(marker, int) else marker


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
        self._last: deque[int] = deque(maxlen=1 if thinking is None else thinking.longest)
        if thinking is not None and thinking.opened_by(prompt):
            self._open()

    @property
    def is_open(self) -> bool:
        """Whether the last token is in a chain of thought."""
        return self._is_open

    def add(self, token: int) -> None:
        """Add a sampled token."""
        self.length += 1
        if self._thinking is None:
            return
        # A closing marker counts without an opening one, and an opening marker inside a thinking block does not.
        self._last.append(token)
        is_opening = self._thinking.mark_at(tuple(self._last))
        if is_opening is False:
            self._hidden, self._is_open = self.length, False
            self._allow(self._reply_limit)
        elif is_opening and not self._is_open:
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
