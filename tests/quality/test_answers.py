from __future__ import annotations

import doctest

import pytest

from selfeval.quality import answers
from selfeval.quality.answers import final_answer, is_answer
from shared_data import shared_lines


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("72", "72"),
        ("48 / 2 = 24, 48 + 24 = 72.\nThe answer is 72.", "Natalia sold 48/2 = 24 clips.\n#### 72"),
        ("So we have\n#### 1,200", "1200"),
        ("The answer is $1,200.50", "1200.5"),
        ("Thus \\boxed{\\frac{3}{4}}.", "0.75"),
        ("First \\boxed{1}, no: \\boxed{2}", "2"),
        ("Is the answer is 5? No. The answer is 6.", "6"),
        ("She has 3 pens, then 5", "5"),
        ("x = -7", "-7"),
        ("x = −7", "-7"),
        ("The answer is 50%", "50"),
        ("1e3", "1000"),
        ("The answer is (B)", "B"),
        ("Answer: b", "B"),
        ("The answer is B) Paris", "B"),
        ("I pick C.", "C"),
        ("The answer is Paris.", "paris"),
        ("Paris", "Paris"),
        ("\\boxed{\\text{Paris}}", "Paris"),
        ("The answer is 3 apples", "3"),
        ("The answer is 5m", "5 m"),
        ("The answer is 3 * 24 = 72", "72"),
        ("The answer is 12:30.", "12:30"),
        ("It is 12:30", "12:30"),
        ("The ratio is 5 : 3.", "5:3"),
        ("The answer is 1, 2", "1,2"),
        ("The answer is 3x + 9", "3x+9"),
        ("The answer is 1,200,000", "1200000"),
        ("The answer is $72$.", "$72$"),
        ("It costs .5", "0.5"),
        ("The answer is A good one: B) Paris", "the answer is a good one: b) paris"),
        # Chinese has no space between words and numbers.
        ("99-90=9，所以还剩9页没有看。", "9"),
        ("一共3个人，每人9元，共27元", "27"),
        ("答:27元", "27"),
        ("答案是27。还有3个人没有付钱。", "27"),
        ("答案为：1/2。验算：1/2+1/2=1", "0.5"),
        ("正确答案：B", "B"),
    ],
)
def test_a_right_answer_is_found(reply: str, answer: str) -> None:
    assert is_answer(reply, [answer])


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("73", "72"),
        ("The answer is 72. Or 73, the answer is 73.", "72"),
        ("72 is what I began with, then 5", "72"),
        ("", "72"),
        ("no number", "72"),
        ("The answer is C", "B"),
        ("所以还剩9页。", "90"),
        ("现在是12:30", "30"),
        ("A nice day", "B"),
        ("I like Paris and Rome", "Paris"),
        ("The answer is 5", "5 apples and 3 pears"),
        ("7", "-7"),
        ("1/0", "5"),
        ("1e999999999", "5"),
        ("\\boxed{5", "6"),
        ("The answer is 12:45.", "12:30"),
        ("The answer is 12:45.", "12"),
        ("It is 12:45", "45"),
        ("The answer is 1, 3", "1, 2"),
        ("The answer is 5:1", "5:3"),
        ("The answer is 3x+9", "3x+2"),
        ("The answer is 3x+9", "3x-9"),
        ("The answer is 3x+9", "9"),
        ("The answer is 3x+9", "3"),
        ("The answer is 1.200,5", "1.200,7"),
        ("It is 112:30", "12:30"),
        ("I think the answer is A or B", "B"),
        ("The answer is A, B", "B"),
    ],
)
def test_a_wrong_answer_is_not_right(reply: str, answer: str) -> None:
    assert not is_answer(reply, [answer])


def test_any_of_several_answers_is_right() -> None:
    assert is_answer("The answer is the USA", ["United States", "the USA"])
    assert not is_answer("The answer is Cuba", ["United States", "the USA"])


def test_a_text_without_a_mark_has_no_final_answer() -> None:
    assert final_answer("Nothing is said here") is None
    assert final_answer("The answer is") is None


def test_the_examples_are_right() -> None:
    assert doctest.testmod(answers).failed == 0


@pytest.mark.parametrize(
    "ending", ["所以还剩{}页。", "答案是{}。", "答:{}元", "答案：{}个，共3人", "9+8={}(元)", "因此，结果为 {}。"]
)
def test_chinese_answers_of_a_public_data_set_are_found(ending: str) -> None:
    rows = shared_lines("math/cmath_dev.jsonl.xz")
    reply = "先算3+4=7，再算：\n" + ending
    assert [row["golden"] for row in rows if not is_answer(reply.format(row["golden"]), [row["golden"]])] == []
    assert [row["golden"] for row in rows if is_answer(reply.format("1" + row["golden"]), [row["golden"]])] == []
