"""Sentences of a text in English, Chinese and other languages with these marks, without a model.

A wrong boundary is worse than a missing one: a passage that is cut in the middle of a sentence misleads, one that is a sentence
longer does not. So a full stop ends a sentence only before a word that can begin one, and not after common abbreviations.
"""

from __future__ import annotations

import re

__all__ = ["sentences"]

_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|etc|approx|ca|no|nos|nr|fig|sec|vol|pp?|dr|mr|mrs|ms|prof|st|jr|sr|inc|ltd|co|dept|est)"
    r"|\b[A-Za-z])\.\Z",
    re.IGNORECASE,
)
_LOOK_BACK = 12
"""Characters before a full stop that can contain an abbreviation, and at least one character before it."""
_END = re.compile(
    r"(?:[。！？；…]+[”’」』）】》\"']*[ \t]*\n?"  # no space is needed after these
    r"|[.!?]+[\"'”’)\]]*(?:[ \t]+|[ \t]*\n)(?=[^\s.,;:!?)\]a-z])"
    r"|\n[ \t]*\n\s*"
    r"|\n(?=[ \t]*(?:[-*+•]|\d+[.)]|\|)[ \t]?))"  # items of a list and rows of a table
)


def sentences(text: str) -> list[str]:
    """Split a text into sentences, list items and table rows. Joined, they are the text: each keeps the space after it.

    Example:
        >>> sentences("Bring it back, e.g. on Sunday. The fee is 2.50 euros! 押金二十元。三天内退还。")
        ['Bring it back, e.g. on Sunday. ', 'The fee is 2.50 euros! ', '押金二十元。', '三天内退还。']
    """
    found: list[str] = []
    start = 0
    for match in _END.finditer(text):
        mark = match.group().rstrip()
        # Looked for in the last characters only: a long text without sentence ends would be searched again at each full stop.
        if mark == "." and _ABBREVIATION.search(text[max(start, match.start() - _LOOK_BACK) : match.start() + 1]):
            continue
        found.append(text[start : match.end()])
        start = match.end()
    return [*found, text[start:]] if text[start:] else found
