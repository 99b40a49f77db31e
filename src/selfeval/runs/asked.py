"""A question or conversation and its replies read from a JSON object, and the evaluator's result as a JSON object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfeval.errors import DataError
from selfeval.grounding import question_with_passage
from selfeval.runs.conversations import AnyQuestion, read_messages
from selfeval.texts import safe_json, shortened

if TYPE_CHECKING:
    from selfeval.runs.evaluator import Ranking

__all__ = ["EXAMPLE", "Asked", "asked_of", "result_of"]

EXAMPLE = '{"question": "...", "replies": ["...", "..."]}'
"""A valid object, for messages."""


@dataclass(frozen=True)
class Asked:
    """A question (text or conversation) with its replies, and the full JSON object that they come from."""

    question: AnyQuestion
    replies: tuple[str, ...]
    values: dict[str, Any]


def asked_of(values: dict[str, Any], where: str) -> Asked:
    """Return the question and the replies in a JSON object: `question` or `messages`, and `replies` or a single `reply`.

    A question with a `passage` is read as in a run (`selfeval.grounding`).

    Args:
        values: the object, such as a line of `selfeval score --file` (`selfeval.texts.json_object` parses one).
        where: its source, for the message.

    Raises:
        DataError: the question or all replies are missing, or one of them is empty; or `messages` is not a conversation that
            ends with a message of the user.
    """
    question, replies = _question(values, where), values.get("replies", [values.get("reply")])
    is_text = isinstance(replies, list) and replies and all(isinstance(reply, str) and reply.strip() for reply in replies)
    if not question or not is_text:
        raise _wrong(where, "expected a question and at least one reply, none of them empty", values)
    return Asked(question, tuple(replies), values)


def _question(values: dict[str, Any], where: str) -> AnyQuestion:
    """Return the question, empty if there is none."""
    if "messages" not in values:
        question = question_with_passage(values) or values.get("question")
        return question if isinstance(question, str) and question.strip() else ""
    if "question" in values:
        raise _wrong(where, 'both "question" and "messages"; keep one of them', values)
    try:
        read_messages(values["messages"])
    except ValueError as error:
        raise _wrong(where, f'"messages" {error}', values) from None
    found: list[dict[str, str]] = values["messages"]
    return found


def _wrong(where: str, problem: str, values: dict[str, Any]) -> DataError:
    return DataError(f"{where}: {problem}; got {shortened(safe_json(values))}; write {EXAMPLE}")


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
