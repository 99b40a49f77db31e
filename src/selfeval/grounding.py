"""Questions that are grounded in a passage: the fixed text in which a reply, the judge and the evaluator read both.

A line of a file with `question` and `passage` becomes a single question of this layout, so every prompt, record and comparison
treats it as any other question:

    Answer from this passage.

    PASSAGE

    Question: QUESTION

With Chinese labels if the question is in Chinese. A caller who wants a reply or a score outside of a run writes the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["grounded", "is_chinese", "passage_of", "question_with_passage"]

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_KANA_OR_HANGUL = re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_LATIN = re.compile(r"[A-Za-z]+")


def is_chinese(text: str) -> bool:
    """Return whether a text is Chinese: it has more than two Han characters per Latin word, and no kana or hangul.

    Example:
        >>> is_chinese("押金是多少？"), is_chinese("What does 押金 mean?"), is_chinese("料金はいくら？")
        (True, False, False)
    """
    characters = len(_HAN.findall(text))
    return characters > 2 * len(_LATIN.findall(text)) and not _KANA_OR_HANGUL.search(text)


def grounded(question: str, passage: str) -> str:
    r"""Return the text that shows a passage and a question about it; see the layout above.

    Example:
        >>> grounded("How much is it?", "The deposit is 20 euros.")
        'Answer from this passage.\n\nThe deposit is 20 euros.\n\nQuestion: How much is it?'
    """
    if is_chinese(question):
        return f"请根据以下资料回答。\n\n{passage.strip()}\n\n问题：{question.strip()}"
    return f"Answer from this passage.\n\n{passage.strip()}\n\nQuestion: {question.strip()}"


def passage_of(values: Mapping[str, Any]) -> str | None:
    """Return the passage of a line of a file; None if it has none, or one that is not a text."""
    passage = values.get("passage")
    return passage.strip() or None if isinstance(passage, str) else None


def question_with_passage(values: Mapping[str, Any]) -> str | None:
    """Return the question of a line of a file that has a passage, in the layout; None for any other line.

    Args:
        values: the line: `question` or `prompt`, and `passage`. A conversation cannot have a passage.
    """
    passage, question = passage_of(values), values.get("question", values.get("prompt"))
    if passage is None or not isinstance(question, str) or not question.strip():
        return None
    return grounded(question, passage)
