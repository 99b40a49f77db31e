from __future__ import annotations

import random
import re
from collections import Counter
from statistics import mean

import pytest

from selfeval.lab.domain import FAMILIES, LARGEST, Family, draw_problem
from selfeval.lab.noise import RIGHT_SHARE, draw_reply, plain_reply, wrong_steps
from selfeval.lab.oracle import WordProblems


def test_a_good_half_of_the_replies_is_wrong() -> None:
    rng, count = random.Random(0), 6000
    right = 0
    for _ in range(count):
        problem = draw_problem(rng)
        right += draw_reply(problem, rng).answer == problem.answer
    # Four standard errors of a share of 6000: 4 * sqrt(0.25 / 6000) = 0.026
    assert right / count == pytest.approx(RIGHT_SHARE, abs=0.026)
    assert 0.35 <= RIGHT_SHARE <= 0.55


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_right_and_wrong_replies_are_what_they_claim(family: Family) -> None:
    rng, gold = random.Random(f"noise/{family.name}"), WordProblems()
    for _ in range(600):
        problem = draw_problem(rng, (family,))
        for right in (True, False):
            reply = draw_reply(problem, rng, right=right)
            assert (reply.answer == problem.answer) is right
            assert gold.is_right(problem.question, reply.text) is right, reply.text
            assert all(0 <= int(number) <= LARGEST for number in re.findall(r"\d+", reply.text)), reply.text
            assert reply.text == " ".join(reply.text.split()), "single spaces, none at the ends"


def test_wrong_steps_never_end_on_the_right_answer() -> None:
    rng = random.Random(3)
    for _ in range(5000):
        problem = draw_problem(rng)
        steps = wrong_steps(problem, rng)
        assert steps[-1].result != problem.answer
        assert all(step.in_range for step in steps)


def test_length_says_little_about_being_right() -> None:
    rng = random.Random(1)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for _ in range(12_000):
        problem = draw_problem(rng)
        for right in (True, False):
            lengths[right].append(len(draw_reply(problem, rng, right=right).text))
    assert mean(lengths[False]) == pytest.approx(mean(lengths[True]), rel=0.05)


def test_style_does_not_depend_on_being_right() -> None:
    """Openings, closings, and symbols or words come in the same shares; four standard errors of 12000 are 0.018."""
    rng, count = random.Random(2), 12_000
    shares: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for _ in range(count):
        problem = draw_problem(rng)
        for right in (True, False):
            reply = draw_reply(problem, rng, right=right)
            words = "in words" if " is " in reply.sentences[0] else "in symbols"
            shares[right].update((reply.opening, reply.closing.rstrip("0123456789"), words))
    for style in shares[True] | shares[False]:
        assert shares[False][style] / count == pytest.approx(shares[True][style] / count, abs=0.018), style


def test_the_popular_misreading_is_a_real_share_of_the_wrong_replies() -> None:
    """Independent random mistakes could be detected by likelihood alone, so over a third share one mistake."""
    rng, count, popular = random.Random(4), 4000, 0
    for _ in range(count):
        problem = draw_problem(rng)
        popular += wrong_steps(problem, rng) == problem.misread_steps()
    assert 0.25 < popular / count < 0.5


def test_the_plain_reply_is_the_exact_calculation() -> None:
    rng, gold = random.Random(6), WordProblems()
    for _ in range(1000):
        problem = draw_problem(rng)
        text = plain_reply(problem)
        assert gold.is_right(problem.question, text) is True
        assert text.count("=") == len(problem.steps)
        for left, operator, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", text):
            exact = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert int(result) == (exact[operator] if operator in exact else int(left) / int(right))
