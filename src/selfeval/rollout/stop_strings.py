"""Stop strings: texts that end a reply, recognised in its decoded tokens while it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from selfeval.backbone.load import LoadedModel
from selfeval.rollout.requests import Rollout

__all__ = ["StopStrings", "before_stop"]


class StopStrings:
    """Recognise stop strings at the end of token ids.

    Only tokens whose text ends no earlier than a stop string can complete one, so most tokens are not decoded together with
    those before them.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text = cache(self._decoded)

    def _decoded(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text

    def end(self, ids: Sequence[int], strings: Sequence[str]) -> bool:
        """Return whether the last token completes one of the strings.

        Args:
            ids: tokens of a reply so far, one or more.
            strings: the stop strings, none of them empty.
        """
        last = self._text(ids[-1])
        # A token may be part of a character, which alone decodes to the replacement character.
        candidates = [string for string in strings if "\ufffd" in last or any(character in last for character in string)]
        if not candidates:
            return False
        # Each token has at least one byte, so the string is within this many of the last tokens.
        longest = max(len(string.encode()) for string in candidates)
        text: str = self._tokenizer.decode(list(ids[-longest - 1 :]))
        return any(string in text for string in candidates)


def before_stop(rollout: Rollout, strings: Sequence[str], loaded: LoadedModel) -> Rollout:
    """Return a reply without its stop string: the longest run of its tokens whose text has none, and an end-of-sequence token.

    The end-of-sequence token was not sampled; its log-prob is given as 0.

    Args:
        rollout: the reply.
        strings: the stop strings.
        loaded: the model, for its tokenizer and its end-of-sequence token.
    """
    kept = len(rollout.ids)
    while any(string in loaded.tokenizer.decode(list(rollout.ids[rollout.hidden : kept])) for string in strings):
        kept -= 1
    if kept == len(rollout.ids):
        return rollout
    end = loaded.eos_ids[:1]
    return replace(
        rollout, ids=(*rollout.ids[:kept], *end), logprobs=(*rollout.logprobs[:kept], *(0.0 for _ in end)), watched=()
    )
