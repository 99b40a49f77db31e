from __future__ import annotations

import pytest

from selfeval.grounding import grounded, is_chinese, question_with_passage


def test_the_layout_is_the_documented_one() -> None:
    line = {"question": " How much? ", "passage": "Prices\n\nA bike is 3 euros.\n", "source": {"file": "a.md"}}
    assert question_with_passage(line) == "Answer from this passage.\n\nPrices\n\nA bike is 3 euros.\n\nQuestion: How much?"
    assert question_with_passage({"prompt": "How much?", "passage": "3 euros."}) == grounded("How much?", "3 euros.")


def test_a_chinese_question_has_chinese_labels() -> None:
    assert grounded("押金是多少？", "押金二十元。") == "请根据以下资料回答。\n\n押金二十元。\n\n问题：押金是多少？"


@pytest.mark.parametrize(
    "line", [{"question": "Q?"}, {"question": "Q?", "passage": " "}, {"passage": "P."}, {"question": 3, "passage": "P."}]
)
def test_a_line_without_both_is_not_grounded(line: dict[str, object]) -> None:
    assert question_with_passage(line) is None


@pytest.mark.parametrize(
    ("text", "expected"), [("退还 iPhone 吗？", True), ("한국어", False), ("Where is 北京?", False), ("", False)]
)
def test_chinese_is_told_by_its_characters(text: str, expected: bool) -> None:
    assert is_chinese(text) is expected
