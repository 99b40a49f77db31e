"""The text of a reply while it is sampled, in pieces that can be sent.

A piece never ends inside a character of several tokens, and contains no part of a stop string. The pieces of a reply add up to
the text that the reply has as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["GrowingText", "TextStream"]

_INCOMPLETE = "\ufffd"
"""The decoder shows an incomplete character as this one."""
_WINDOW = 16
"""Tokens decoded again with each new one: decoders treat the first token differently, and join parts of characters."""


class GrowingText:
    """The text of a reply whenever a token is added, at the cost of decoding the last few tokens only.

    Args:
        decode: returns the text of token ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._begin, self._end, self._text = 0, 0, ""  # the tokens decoded for context, and the text up to their end

    def of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, which equals `decode(ids)`.

        Args:
            ids: all tokens so far; those of the call before, and any number of further ones.
        """
        context, recent = self._decode(ids[self._begin : self._end]), self._decode(ids[self._begin :])
        text = self._text + recent[len(context) :] if recent.startswith(context) else self._decode(ids)
        # Only where a character ends: the text before the window never changes.
        if len(ids) - self._end >= _WINDOW and not text.endswith(_INCOMPLETE):
            self._begin, self._end, self._text = self._end, len(ids), text
        return text


class TextStream:
    """Cut a growing reply into pieces of text.

    Args:
        decode: returns the text of token ids.
        stop_strings: texts that end the reply and are not part of it.
        strip: remove white space around the reply, as a run does.

    Attributes:
        sent: length of the pieces so far.
        stopped: whether a stop string was found.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop_strings: Sequence[str] = (), *, strip: bool = False
    ) -> None:
        self._decode, self._stop_strings, self._strip = decode, tuple(stop_strings), strip
        self._growing = GrowingText(decode)
        self.sent, self.stopped = 0, False

    def piece(self, ids: Sequence[int]) -> str:
        """Return the text that can be sent now and was not sent before.

        Args:
            ids: all tokens of the reply so far.
        """
        text = self._before_stop(self._growing.of(ids))
        if not self.stopped:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - self._possible_stop(text)]
        return self._send(text)

    def rest(self, ids: Sequence[int], *, finished: bool) -> str:
        """Return the text that is left when the reply has ended.

        Args:
            ids: all tokens of the reply.
            finished: whether it ended by itself; at a token limit, an incomplete last character is dropped.
        """
        text = self._before_stop(self._decode(ids))
        return self._send(text if finished else text.rstrip(_INCOMPLETE))

    def _before_stop(self, text: str) -> str:
        places = [place for string in self._stop_strings if (place := text.find(string)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _possible_stop(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max((len(string) for string in self._stop_strings), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(string.startswith(text[-n:]) for string in self._stop_strings)), 0)

    def _send(self, text: str) -> str:
        text = text.strip() if self._strip else text
        piece = text[self.sent :]
        self.sent += len(piece)
        return piece
