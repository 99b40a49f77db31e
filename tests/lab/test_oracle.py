from __future__ import annotations

import random

import pytest

from selfeval.lab.domain import draw_problem
from selfeval.lab.oracle import WordProblems

QUESTION = "Mia shares 18 stamps among 6 friends. How many stamps does each friend get?"


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("18 / 6 = 3. The answer is 3", True),
        ("18 / 6 = 3. So the answer is 3.", True),
        ("  The answer is 3 \n", True),
        ("18 / 6 = 4. The answer is 3", True),
        ("18 / 6 = 3. The answer is 4", False),
        ("The answer is 3. The answer is 4", False),
        ("The answer is 4. The answer is 3", True),
        ("The answer is 33", False),
        ("The answer is 13", False),
        ("The answer is 3 or 4", False),
        ("3", False),
        ("The answer is three", False),
        ("The answer is", False),
        ("", False),
    ],
)
def test_only_the_final_answer_counts(reply: str, right: bool) -> None:
    assert WordProblems().is_right(QUESTION, reply) is right


def test_a_question_without_gold_has_no_right_and_no_wrong() -> None:
    gold = WordProblems()
    assert gold.answer("What is love?") is None
    assert gold.is_right("What is love?", "The answer is 3") is None


def test_the_answer_of_every_drawn_problem_is_known() -> None:
    gold, rng = WordProblems(), random.Random(0)
    for _ in range(2000):
        problem = draw_problem(rng)
        assert gold.answer(problem.question) == problem.answer
        assert gold.is_right(problem.question, f"The answer is {problem.answer}") is True
        assert gold.is_right(problem.question, f"The answer is {problem.answer + 1}") is False
