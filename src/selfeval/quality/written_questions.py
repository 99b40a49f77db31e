"""The question in a text that an instruct model wrote: without the label and the preamble around it.

Asked for a question, an instruct model often writes "Sure! Here is a new question:" first, labels the question, or puts it in
quotation marks or bold type. Only clear cases are removed, because "Here is a list of numbers: 3, 5" begins a question.
"""

from __future__ import annotations

import re

__all__ = ["bare_question"]

_COURTESY = r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|great)\s*[!,.]+"
_HERE = r"(?:here(?:'s| is| are)|this is)\b"
_PREAMBLE_LINE = re.compile(
    rf"\s*(?:{_COURTESY}(?:[^\n]{{0,200}}:)?|{_HERE}[^\n:]{{0,80}}\b(?:questions?|problem|riddle|prompt|one)\b[^\n:]{{0,80}}:)"
    r"[*_]*[ \t]*\n\s*",
    re.IGNORECASE,
)
"""A separate first line: a courtesy, or an announcement of a question that ends with a colon."""
_PREAMBLE = re.compile(
    rf"\s*(?:{_COURTESY}\s*)?{_HERE}\s+(?:a|an|one|your|the|another|my)\s+(?:[\w-]+\s+){{0,4}}question\b[^\n:]{{0,80}}:\s*",
    re.IGNORECASE,
)
"""An announcement on the line of the question."""
_LABEL = re.compile(
    r"\s*[*_#>\s]*(?:(?:new|next|my|example|sample|generated)\s+)?(?:question|q)(?:\s*#?\d{1,3})?\s*[*_]*\s*[:.)][*_]*\s*",
    re.IGNORECASE,
)
_WRAPPERS = (("**", "**"), ('"', '"'), ("\u201c", "\u201d"), ("*", "*"))


def bare_question(text: str) -> str:
    """Remove preamble, label, and quotation marks or bold type around a question.

    Example:
        >>> bare_question("Sure! Here is a new question:\\n\\n**Question:** How many pears are left?")
        'How many pears are left?'
        >>> bare_question("Here is a list of numbers: 3, 5. What is their sum?")
        'Here is a list of numbers: 3, 5. What is their sum?'
    """
    for pattern in (_PREAMBLE_LINE, _PREAMBLE, _LABEL):
        match = pattern.match(text)
        if match and text[match.end() :].strip():  # a text that consists of the preamble is left to the filters
            text = text[match.end() :]
    return _unwrapped(text.strip())


def _unwrapped(text: str) -> str:
    for begin, end in _WRAPPERS:
        inner = text[len(begin) : -len(end)]
        if inner and text.startswith(begin) and text.endswith(end) and begin not in inner and end not in inner:
            return inner.strip()
    return text
