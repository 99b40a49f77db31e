"""A question and its replies read from a JSON object, and the evaluator's result as a JSON object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfeval.errors import DataError
from selfeval.texts import safe_json, shortened

if TYPE_CHECKING:
    from selfeval.runs.evaluator import Ranking

__all__ = ["EXAMPLE", "Asked", "asked_of", "result_of"]

EXAMPLE = '{"question": "...", "replies": ["...", "..."]}'
"""A valid object, for messages."""


@dataclass(frozen=True)
class Asked:
    """A question with its replies, and the full JSON object that they come from."""

    question: str
    replies: tuple[str, ...]
    values: dict[str, Any]


def asked_of(values: dict[str, Any], where: str) -> Asked:
    """Return the question and the replies in a JSON object: `question`, and `replies` or a single `reply`.

    Args:
        values: the object, such as a line of `selfeval score --file` (`selfeval.texts.json_object` parses one).
        where: its source, for the message.

    Raises:
        DataError: the question or all replies are missing, or one of them is empty.
    """
    question, replies = values.get("question"), values.get("replies", [values.get("reply")])
    is_text = isinstance(replies, list) and replies and all(isinstance(reply, str) and reply.strip() for reply in replies)
    if not isinstance(question, str) or not question.strip() or not is_text:
        problem = "expected a question and at least one reply, none of them empty"
        raise DataError(f"{where}: {problem}; got {shortened(safe_json(values))}; write {EXAMPLE}")
    return Asked(question, tuple(replies), values)


def result_of(asked: Asked, result: Ranking) -> dict[str, Any]:
    """Return the fields of the object that was asked, and those of the evaluator's result. Scores have six decimals."""
    return {
        **asked.values,
        "scores": [round(score, 6) for score in result.scores],
        "preferred": result.preferred,
        "confidence": None if result.confidence is None else round(result.confidence, 6),
        "unsure": result.unsure,
        "calibrated": result.calibrated,
    }
