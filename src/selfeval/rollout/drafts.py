"""Drafts of the next tokens of a reply, from places where its last tokens occurred before.

A draft costs a lookup and no model: prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding)
in the prompt and in the reply so far, and in earlier replies to the same prompt (the retrieval of REST, He et al. 2023,
https://arxiv.org/abs/2311.08252). One pass over the last token and its draft then computes the logits after each of them.

Every token is sampled from its logits with its own random number, as without a draft, and the draft is correct as far as it
equals the sampled tokens. The reply is therefore that of plain decoding, and not only distributed like it: the acceptance rule
of speculative sampling (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192) draws other random numbers.

Whether a draft is read is decided from counts of tokens, never from a clock, so the same request is decoded in the same passes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from enum import StrEnum

__all__ = ["DraftCounts", "Drafts", "EarlierReplies", "Speculation"]

_LENGTHS = (3, 2)
"""Number of last tokens that are looked up, longest first. A single token was continued correctly in too few places."""
_FIRST, _FEWEST, _MOST = 4, 2, 16
"""Tokens of the first draft, and bounds of the later ones."""
_COST = 0.5
"""Cost of the draft's tokens in plain steps: a pass over up to 9 tokens took 1.2 to 1.8 times as long as one over a single
token (benchmarks/speculation.py)."""
_NEWEST = 0.2
"""Weight of the newest draft in the mean of correct tokens."""
_PROMPTS, _REPLIES = 64, 4
"""Number of prompts whose replies are remembered, and of replies to each."""


class Speculation(StrEnum):
    """When drafts are read: never, always, or where earlier drafts of the reply were correct often enough (`auto`)."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


class DraftCounts:
    """Number of drafted tokens that were read, and how many of them were correct.

    Attributes:
        read: drafted tokens in a pass.
        accepted: those that equal the sampled token.
    """

    def __init__(self) -> None:
        self.read = 0
        self.accepted = 0


class Drafts:
    """Drafts of one reply.

    Args:
        prompt: tokens of the prompt.
        earlier: Optional. Earlier replies to the same prompt.
        always: return every draft, even if the earlier ones were wrong. Default: False.
    """

    def __init__(self, prompt: Sequence[int], earlier: Iterable[Sequence[int]] = (), *, always: bool = False) -> None:
        self._always = always
        self._text = list(prompt)
        self._prompt_length = len(prompt)
        # The text and the position behind the latest place of each sequence of last tokens.
        self._found: dict[tuple[int, ...], tuple[list[int], int]] = {}
        for end in range(1, len(self._text)):
            self._note(self._text, end)
        for reply in earlier:
            text = [*prompt[-_LENGTHS[0] :], *reply]
            for end in range(len(text) - len(reply), len(text)):
                self._note(text, end)
        self._open: list[int] = []
        self._correct = 0
        self._mean = 1.0  # optimistic, so that the first drafts are read
        self._length = _FIRST

    def next(self, reply: Sequence[int], most: int) -> list[int]:
        """Return a draft of the tokens after these; empty if there is none, or if it would probably cost more than it saves.

        A draft that is not returned is compared with the reply as well: drafts resume when they become correct.

        Args:
            reply: the tokens so far: those of the last call, and new ones.
            most: maximum number of tokens.
        """
        for token in reply[len(self._text) - self._prompt_length :]:
            self._add(token)
        if self._open or most < 1:
            return []
        self._open, self._correct = self._lookup(min(self._length, most)), 0
        return list(self._open) if self._always or self._mean > _COST else []

    def _lookup(self, most: int) -> list[int]:
        for length in _LENGTHS:
            if len(self._text) >= length and (place := self._found.get(tuple(self._text[-length:]))):
                text, start = place
                return text[start : start + most]
        return []

    def _add(self, token: int) -> None:
        """Append a token of the reply, and compare it with the draft."""
        self._note(self._text, len(self._text))
        self._text.append(token)
        if not self._open:
            return
        is_correct = token == self._open[self._correct]
        self._correct += is_correct
        if not is_correct or self._correct == len(self._open):
            self._close()

    def _close(self) -> None:
        """Enter the result of a draft into the mean and into the length of the next one."""
        self._mean += _NEWEST * (self._correct - self._mean)
        whole = self._correct == len(self._open)
        self._length = min(2 * self._length, _MOST) if whole else max(self._correct + 1, _FEWEST)
        self._open = []

    def _note(self, text: list[int], end: int) -> None:
        """Remember the place behind the tokens that end here; a later one replaces it."""
        for length in _LENGTHS:
            if end >= length:
                self._found[tuple(text[end - length : end])] = text, end


class EarlierReplies:
    """The last replies to each of the prompts that were answered last."""

    def __init__(self) -> None:
        self._replies: OrderedDict[tuple[int, ...], deque[tuple[int, ...]]] = OrderedDict()

    def to(self, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the replies to a prompt, oldest first."""
        return tuple(self._replies.get(prompt, ()))

    def add(self, prompt: tuple[int, ...], reply: tuple[int, ...]) -> None:
        """Remember a reply; the oldest ones are forgotten."""
        self._replies.setdefault(prompt, deque(maxlen=_REPLIES)).append(reply)
        self._replies.move_to_end(prompt)
        if len(self._replies) > _PROMPTS:
            self._replies.popitem(last=False)
