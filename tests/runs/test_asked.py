"""A question with its replies as JSON, as `selfeval score` reads and writes it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from selfeval.errors import DataError
from selfeval.runs.asked import EXAMPLE, Asked, asked_of, result_of
from selfeval.runs.evaluator import Ranking
from selfeval.texts import json_object


def test_replies_or_one_reply_are_read_and_all_fields_are_kept() -> None:
    both = {"question": "Why?", "replies": ["a", "b"], "id": 7}
    assert asked_of(both, "line 1") == Asked("Why?", ("a", "b"), both)
    one = {"question": "Why?", "reply": "a"}
    assert asked_of(one, "line 1") == Asked("Why?", ("a",), one)
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2."}, {"role": "user", "content": "Why?"}]
    conversation = {"messages": turns, "reply": "a"}
    assert asked_of(conversation, "line 1") == Asked(turns, ("a",), conversation)
    assert asked_of(json_object(EXAMPLE), "example").replies == ("...", "...")


@pytest.mark.parametrize(
    "values",
    [
        {"replies": ["a"]},
        {"question": " ", "replies": ["a"]},
        {"question": "Why?"},
        {"question": "Why?", "replies": []},
        {"question": "Why?", "replies": "a"},
        {"question": "Why?", "replies": ["a", ""]},
        {"question": 7, "reply": "a"},
    ],
)
def test_an_object_without_question_or_reply_is_refused(values: dict[str, Any]) -> None:
    said = "request: expected a question and at least one reply, none of them empty; got {"
    with pytest.raises(DataError, match=re.escape(said)):
        asked_of(values, "request")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, '"messages" must end with a turn of the user, got assistant'),
        ({"messages": [{"role": "user", "content": "Hi."}], "question": "Hi."}, 'both "question" and "messages"; keep one'),
    ],
)
def test_a_malformed_conversation_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"line 3: {said}")):
        asked_of({**values, "reply": "a"}, "line 3")


def test_the_result_has_the_fields_of_the_object_and_of_the_ranking() -> None:
    asked = asked_of({"question": "Why?", "replies": ["a", "b"], "id": 7}, "line 1")
    found = result_of(asked, Ranking((1 / 3, -2.0), 0, 0.9123456789, unsure=False, calibrated=True))
    assert found == {
        "question": "Why?", "replies": ["a", "b"], "id": 7,
        "scores": [0.333333, -2.0], "preferred": 0, "confidence": 0.912346, "unsure": False, "calibrated": True,
    }  # fmt: skip
    assert result_of(asked, Ranking((0.0,), None, None, unsure=True, calibrated=True))["confidence"] is None


def test_a_passage_is_read_with_the_question() -> None:
    values = {"question": "How much?", "passage": "A bike is 3 euros.", "reply": "3 euros."}
    found = asked_of(values, "line 1")
    assert found.question == "Answer from this passage.\n\nA bike is 3 euros.\n\nQuestion: How much?"
    assert found.values == values
