"""Filters for questions that a model wrote about a passage, and for its reply to them with the passage in view.

They find clear cases: a question that can only be asked with the passage in view, and a reply that is not in the passage. A
reply that is in the passage need not answer the question; whether it does is for the judge and for people to say.
"""

from __future__ import annotations

import re

from selfeval.quality.dedupe import normalise
from selfeval.quality.written_questions import bare_question

__all__ = ["LEAST_RELATED", "LEAST_SUPPORT", "first_question", "passage_reason", "says_unanswered", "share_in", "support"]

LEAST_SUPPORT = 0.6
"""A question is dropped if less than this share of the words that its reply adds are in the passage."""

LEAST_RELATED = 0.2
"""A question is dropped if less than this share of its words is in the passage: it names nothing that the passage is about."""

_SHOWN = "passage|text|document|article|paragraph|excerpt|extract|section"
_PLACED = "above|following|given|provided|preceding|previous"
_REFERS = re.compile(
    rf"\b(?:according to|based on|described by|in|from) (?:the|this|these) (?:(?:{_PLACED}) )?(?:{_SHOWN})\b"
    rf"|\b(?:the|this) (?:{_PLACED}) (?:{_SHOWN}|context|information|list|table)\b"
    r"|\bthis (?:passage|text|article|paragraph|excerpt)\b|\bthe passage\b"
    # The author of a named work may be asked for, so these need a word of reporting.
    r"|\b(?:according to|does|did|would) the (?:author|narrator)\b(?! of\b)"
    r"|\bthe (?:author|narrator)(?:'s (?:main|opinion|view|point|purpose|tone|attitude)"
    r"| (?:says?|states?|mentions?|describes?|suggests?|argues?|claims?|thinks?|explains?|writes?|recommends?|means?))\b"
    r"|\b(?:mentioned|described|listed|stated|given|shown) (?:above|below|here)\b",
    re.IGNORECASE,
)
_REFERS_CHINESE = re.compile(
    r"[上下本该]文|上述|文中|(?:这|本|该|此)[篇段份](?:文|资料|材料|话)|[资材]料[中里提指显]|文[章档][中里提]"
    r"|(?:根据|按照|依据|据)作者|作者(?:认为|提到|说|指出|介绍|建议|觉得|想|的(?:观点|看法|意图|目的|态度))"
    r"|以上(?:内容|资料|信息|文字)|(?:根据|按照|依据)(?:以上|上面|这份|该)?(?:资料|文本|文档|文章|材料|内容|描述|段落)"
)
_UNANSWERED = re.compile(
    r"\bnot in the passage\b|\bnot (?:stated|mentioned|specified)\b"
    # Not "no information desk": the word ends the reply, or another one follows that can only be about a text.
    r"|\bno (?:information|mention|answer) (?:in|about|regarding|(?:is )?(?:given|provided))\b"
    r"|\bno (?:mention of|answer to (?:this|that|the) question)\b"
    r"|\A\W*(?:there is )?no (?:information|mention|answer)\W*\Z"
    r"|\b(?:passage|text|context) (?:does not|doesn't) (?:say|state|mention|specify|provide|contain|give|answer|include)\b"
    r"|资料中没有|没有(?:提到|提及|说明|给出|写明)|未(?:提及|提到|说明|给出|注明)|无法(?:回答|确定|得知)",
    re.IGNORECASE,
)
_QUESTION_MARK = re.compile(r"[?？؟\u037e]")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
_STEM = 6
_SHORTEST_WORD = 4
"""Letters of the shortest word that counts: most shorter ones (the, and, is) are in every passage."""


def passage_reason(question: str) -> str | None:
    """Return the reason to drop a question for its form: `no_question_mark` or `refers_to_passage`; None if it is usable.

    Example:
        >>> passage_reason("What does the passage say about bikes?"), passage_reason("How much is a bike per day?")
        ('refers_to_passage', None)
    """
    if not _QUESTION_MARK.search(question):
        return "no_question_mark"
    return "refers_to_passage" if _REFERS.search(question.replace("\u2019", "'")) or _REFERS_CHINESE.search(question) else None


def first_question(text: str) -> str:
    """Return the first line of a text if it is a question: models often add an answer or an explanation.

    Example:
        >>> first_question('"How much is it?"\\n\\nIt is free.')
        'How much is it?'
        >>> first_question("I have a bike.\\nHow do I return it?")
        'I have a bike.\\nHow do I return it?'
    """
    line = text.strip().partition("\n")[0].strip()
    return bare_question(line) if _QUESTION_MARK.match(line.rstrip('"\u201d*_ ')[-1:]) else text


def share_in(question: str, passage: str) -> float:
    """Compute the share of the units of a question (see `support`) that are in the passage; 0 if it has none.

    Example:
        >>> share_in("What is the answer?", "A bike costs 3 euros.")
        0.0
    """
    asked = _units(question)
    return len(asked & _units(passage)) / len(asked) if asked else 0.0


def says_unanswered(reply: str) -> bool:
    """Return whether a reply says that the passage does not have the answer.

    Example:
        >>> says_unanswered("Not in the passage."), says_unanswered("It is not refunded.")
        (True, False)
    """
    return bool(_UNANSWERED.search(reply.replace("\u2019", "'")))


def support(reply: str, passage: str, question: str) -> float:
    """Compute which share of what a reply adds to the question is in the passage.

    Units are numbers, words of at least four letters without their endings, and pairs of Chinese or Japanese characters; those
    of the question do not count. A number that is in neither passage nor question makes the support 0: a wrong price is worse
    than another word.

    Args:
        reply: reply to the question, written with the passage in view.
        passage: the passage, with its headings.
        question: the question.

    Returns:
        From 0 to 1; 0 for a reply that adds nothing, such as "Yes.", because it cannot be checked.

    Example:
        >>> support("You can keep it for 24 hours.", "A bike is yours for 24 hours.", "How long may I keep a bike?")
        1.0
        >>> support("It costs 9 euros.", "A bike costs 3 euros.", "How much is a bike?")
        0.0
    """
    known = _units(passage) | _units(question)
    added = _units(reply) - _units(question)
    if not added or (_numbers(reply) - _numbers(passage) - _numbers(question)):
        return 0.0
    return len(added & known) / len(added)


def _numbers(text: str) -> set[str]:
    return set(_NUMBER.findall(normalise(text)))


def _units(text: str) -> set[str]:
    folded = normalise(text)
    runs = _HAN.findall(folded)
    pairs = {run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))}
    words = _WORD.findall(_HAN.sub(" ", folded))
    return pairs | _numbers(text) | {_stem(word) for word in words if len(word) >= _SHORTEST_WORD and not word[0].isdigit()}


def _stem(word: str) -> str:
    """Return the beginning of a word, so that `charges` and `charged` are the same unit, in any language with endings."""
    return word.removesuffix("s")[:_STEM]
