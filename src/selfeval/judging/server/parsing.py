"""Parse the body of a chat completion, and find the verdict in its text and in its log-probs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from selfeval.judging.labels import Labels
from selfeval.judging.reading import Place, find_verdict, thinking_of
from selfeval.judging.server.chat import Answer, Ending, Token
from selfeval.servers.connection import Malformed
from selfeval.texts import json_object

__all__ = ["bare", "parse_answer", "verdict_in"]

_DECORATION = " \t\n*_`\"'“”()[]{}$.:"
"""Characters around a label that are not part of it."""

_ENDINGS: Mapping[str, Ending] = {"stop": "stop", "length": "cut", "content_filter": "refused"}


def parse_answer(body: str, labels: Labels) -> Answer:
    """Return the part of a chat completion that a judge reads.

    Args:
        body: body of the response.
        labels: words of the verdict, at which the log-probs are kept.

    Raises:
        Malformed: it is no JSON, or no chat completion.
    """
    completion = _object(body)
    choice = _first_choice(completion)
    message = choice["message"]
    # Models that only think, and filters, leave the content empty or null.
    text, refusal = _text(message.get("content")), _text(message.get("refusal"))
    ending: Ending = "refused" if refusal else _ENDINGS.get(str(choice.get("finish_reason")), "stop")
    tokens = _tokens(choice)
    usage = completion.get("usage")
    return Answer(
        refusal or text,
        ending,
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
        bool(tokens) or not (refusal or text),
        _at_verdict(tokens, labels, finished=ending == "stop"),
    )


def _object(body: str) -> Mapping[str, Any]:
    try:
        return json_object(body)
    except (TypeError, ValueError) as error:
        raise Malformed(f"the body is not a JSON object: {error}") from error


def _first_choice(completion: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise Malformed("the response has no choices[0].message")
    return choice


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(usage: Any, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int and count >= 0 else None


def _tokens(choice: Mapping[str, Any]) -> list[Token]:
    """Return the tokens with their alternatives; none if any of them is not in the form of the protocol."""
    found = choice.get("logprobs")
    rows = found.get("content") if isinstance(found, dict) else None
    try:
        return [Token(str(row["token"]), _alternatives(row)) for row in rows or ()]
    except (KeyError, TypeError, ValueError):
        return []


def _alternatives(row: Mapping[str, Any]) -> dict[str, float]:
    # The sampled token may be missing among the alternatives.
    rows = [*(row.get("top_logprobs") or ()), row]
    return {str(one["token"]): float(one["logprob"]) for one in rows}


def _at_verdict(tokens: Sequence[Token], labels: Labels, *, finished: bool) -> Mapping[str, float] | None:
    # In the text of the tokens: its positions are those of the tokens, whatever the content does with special characters.
    place = verdict_in("".join(token.text for token in tokens), labels, finished=finished)
    if place is None:
        return None
    ends = accumulate(len(token.text) for token in tokens)
    return next(token.alternatives for token, end in zip(tokens, ends, strict=True) if end > place.label)


def verdict_in(text: str, labels: Labels, *, finished: bool) -> Place | None:
    """Return the deciding statement of an answer, or the label if the answer is nothing else.

    Args:
        text: the answer, which may begin with thinking.
        labels: the words of a verdict, with a lead.
        finished: whether the answer ended by itself.
    """
    begin = thinking_of(text).end
    if begin is None:
        return None
    place = find_verdict(text[begin:], labels, finished=finished)
    if place is not None:
        return Place(begin + place.lead, begin + place.label)
    whole = bare(text[begin:])
    if not finished or whole not in {bare(label) for label in labels.all}:
        return None
    start = text.index(whole, begin)
    return Place(start, start)


def bare(text: str) -> str:
    """Return a text without the decoration around it; labels may be decorated too, such as `[A]`.

    Example:
        >>> bare(' "[A]".'), bare(" neither")
        ('A', 'neither')
    """
    return text.strip(_DECORATION)
