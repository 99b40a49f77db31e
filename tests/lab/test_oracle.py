from __future__ import annotations

import random

import pytest

from selfeval.lab.domain import draw_problem
from selfeval.lab.noise import draw_reply
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


TWO_STEPS = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"


@pytest.mark.parametrize(
    ("steps", "right"),
    [
        (["Let us see.", " 18 / 6 = 3.", " The answer is 3"], [True, True, True]),
        (["18 divided by 6 is 3.", " So the answer is 3."], [True, True]),
        (["18 / 6 = 4.", " The answer is 3"], [False, False]),
        (["18 / 6 = 3.", " The answer is 4"], [True, False]),
        (["18 - 6 = 12.", " The answer is 12"], [False, False]),
        (["6 / 18 = 3.", " The answer is 3"], [False, False]),
        # A further step after the last one, a number outside of an equation, and an answer without its end.
        (["18 / 6 = 3.", " Then 3 + 6 = 9.", " The answer is 9"], [True, False, False]),
        (["18 / = 3.", " OK."], [False, False]),
        (["18 / 6 = 3.", " The answer is 3 or 4"], [True, False]),
        (["The answer is 3"], [True]),
        ([], []),
    ],
)
def test_every_step_has_an_exact_label(steps: list[str], right: list[bool]) -> None:
    assert WordProblems().right_steps(QUESTION, steps) == right


def test_summands_may_be_swapped() -> None:
    assert WordProblems().right_steps(TWO_STEPS, ["2 + 3 = 5.", " The answer is 5"]) == [True, True]


def test_steps_of_a_question_without_gold_have_no_label() -> None:
    assert WordProblems().right_steps("What is love?", ["The answer is 3"]) is None


def test_steps_are_wrong_from_where_a_reply_leaves_the_solution() -> None:
    rng, gold = random.Random(0), WordProblems()
    for number in range(400):
        problem = draw_problem(rng)
        reply = draw_reply(problem, rng, right=number % 2 == 0)
        on_path = [i < len(problem.steps) and step == problem.steps[i] for i, step in enumerate(reply.steps)]
        expected = [all(on_path[: i + 1]) for i in range(len(on_path))]
        closing = all(on_path) and reply.answer == problem.answer
        assert gold.right_steps(problem.question, [*reply.sentences, reply.closing]) == [*expected, closing]
        assert closing is (number % 2 == 0)
