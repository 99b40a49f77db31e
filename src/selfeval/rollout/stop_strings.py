"""Stop strings: texts that end a reply, recognised in its decoded tokens while it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from selfeval.backbone.load import LoadedModel
from selfeval.rollout.requests import Rollout

__all__ = ["StopStrings", "before_stop"]


class StopStrings:
    """Recognise stop strings at the end of token ids.

    Args:
        tokenizer: decodes the tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def end(self, ids: Sequence[int], strings: Sequence[str]) -> bool:
        """Return whether the last tokens contain one of the strings.

        Args:
            ids: tokens of a reply so far, one or more.
            strings: the stop strings, none of them empty.
        """
        # Each token has at least one byte, so a string that the last token completes is within this many tokens. They are
        # decoded together: alone, a token may be part of a character, or lose the space before it.
        longest = max(len(string.encode()) for string in strings)
        text: str = self._tokenizer.decode(list(ids[-longest - 1 :]))
        return any(string in text for string in strings)


def before_stop(rollout: Rollout, strings: Sequence[str], loaded: LoadedModel) -> Rollout:
    """Return a reply up to its first stop string: the tokens whose text is before it, and an end-of-sequence token.

    The end-of-sequence token was not sampled; its log-prob is given as 0.

    Args:
        rollout: the reply.
        strings: the stop strings.
        loaded: the model, for its tokenizer and its end-of-sequence token.
    """

    def text(count: int) -> str:
        decoded: str = loaded.tokenizer.decode(list(rollout.ids[rollout.hidden : count]))
        return decoded

    kept, whole = len(rollout.ids), text(len(rollout.ids)) if strings else ""
    places = [place for string in strings if (place := whole.find(string)) >= 0]
    if not places:
        return rollout
    while len(text(kept)) > min(places):
        kept -= 1
    end = loaded.eos_ids[:1]
    return replace(
        rollout, ids=(*rollout.ids[:kept], *end), logprobs=(*rollout.logprobs[:kept], *(0.0 for _ in end)), watched=()
    )
