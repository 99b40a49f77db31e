"""Split a reply into steps, for process supervision: sentences or lines, as text and as spans of token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

from selfeval.config import StepForm
from selfeval.judging.reading import token_at

__all__ = ["split_steps", "step_ends", "step_texts"]

_ENDS = {
    "lines": re.compile(r"\n\s*"),
    # After the mark, so that the space belongs to the next sentence, as it does in the tokens of most models. Marks of Chinese
    # need no space behind them, and a number such as 3.5 is no end.
    "sentences": re.compile(r"""\n\s*|[.!?][\])"'”’*]*(?=[^\S\n])|[。！？][”’」』]*"""),
}
_NUMBERING = re.compile(r"\s*(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]")


def split_steps(text: str, form: StepForm) -> list[str]:
    """Split the text of a reply into steps; joined, they are the text.

    Args:
        text: any text.
        form: `lines`: a step ends at the end of a line. `sentences`: also at the end of a sentence. Blank lines belong to the
            step before them, and the number of a list item to the step behind it.

    Example:
        >>> split_steps("Tom has 3 + 4 = 7. He pays 2.50 each.\\n\\n1. The answer is 7", "sentences")
        ['Tom has 3 + 4 = 7.', ' He pays 2.50 each.\\n\\n', '1. The answer is 7']
    """
    cuts = [0, *(match.end() for match in _ENDS[form].finditer(text)), len(text)]
    steps: list[str] = []
    begun = ""
    for start, end in pairwise(cuts):
        begun += text[start:end]
        if not begun.strip():
            # Blank: part of the step before, or of the next one at the beginning of a reply.
            steps[-1:] = [steps[-1] + begun] if steps else []
            begun = "" if steps else begun
        elif not _NUMBERING.fullmatch(begun):
            steps.append(begun)
            begun = ""
    return [*steps, begun] if begun else steps


def step_ends(
    ids: Sequence[int], decode: Callable[[list[int]], str], form: StepForm, end_ids: Collection[int] = ()
) -> tuple[int, ...]:
    """Return the number of tokens up to the end of each step of a reply.

    A token that is part of two steps belongs to the first one, because a step is scored at its last token. A step without
    tokens that are only its own is merged with the one before. End tokens belong to the last step.

    Args:
        ids: token ids of the reply.
        decode: returns the text of token ids.
        form: form of the steps.
        end_ids: tokens that end a reply. Default: none.

    Returns:
        Increasing numbers, the last of which is the length of `ids`; empty for a reply without tokens.
    """
    written = len(ids)
    while written and ids[written - 1] in end_ids:
        written -= 1

    def text_of(count: int) -> str:
        return decode(list(ids[:count]))

    ends, length = set[int](), 0
    for step in split_steps(text_of(written), form)[:-1]:
        length += len(step)
        whole = token_at(text_of, written, length)
        ends.add(whole if len(text_of(whole)) == length else whole + 1)
    # The last step has the end tokens, and all tokens that do not decode to text.
    return tuple(sorted(end for end in ends if 0 < end < written)) + ((len(ids),) if ids else ())


def step_texts(ids: Sequence[int], ends: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return the text that each step adds to a reply.

    Args:
        ids: token ids of the reply.
        ends: number of tokens up to the end of each step.
        decode: returns the text of token ids.
    """
    starts = (0, *ends)
    before = [decode(list(ids[:count])) for count in starts]
    # Differences of decoded beginnings, because a tokenizer may decode a step by itself without its first space.
    return [now[len(earlier) :] for earlier, now in pairwise(before)]
