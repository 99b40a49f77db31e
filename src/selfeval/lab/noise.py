"""The replies of the pretraining corpus: in many styles, and more often wrong than right.

Style (opening words, symbols or words, connectives) is drawn independently of correctness, so length and fluency carry little
information about it. Some kinds of errors are rare slips, others are common (a wrong operation, a missing step). If a model
made rare slips only, its own likelihood would be enough to detect them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from selfeval.lab.domain import LARGEST, Problem, Step, draw_problem

__all__ = ["ERROR_KINDS", "GRADED_ERRORS", "RIGHT_SHARE", "Reply", "draw_reply", "draw_sum", "plain_reply", "wrong_steps"]

RIGHT_SHARE = 0.36
"""Share of right replies in the pretraining corpus."""

ERROR_KINDS = {"misreading": 0.36, "operand": 0.18, "slip": 0.28, "missed": 0.08, "extra": 0.10}
"""Weights of the error types in wrong replies; a type that does not fit the problem is redrawn."""

GRADED_ERRORS = {"misreading": 0.16, "operand": 0.30, "slip": 0.40, "missed": 0.06, "extra": 0.08}
"""The same for marked replies, with more errors that only checking the numbers can find."""

_OPENINGS = ("", "", "Let us see.", "We work it out.", "First we look at the numbers.", "Here is how it goes.", "Well,", "OK.")
_CONNECTIVES = ("", "", "Then", "After that", "Next")
_CLOSINGS = ("The answer is", "So the answer is")
_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


@dataclass(frozen=True)
class Reply:
    """A reply in parts: opening, one sentence per step, closing; `answer` is its final number."""

    opening: str
    sentences: tuple[str, ...]
    steps: tuple[Step, ...]
    closing: str

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def text(self) -> str:
        return " ".join(part for part in (self.opening, *self.sentences, self.closing) if part)


def _written(step: Step, in_words: bool, connective: str) -> str:
    operator = _WORDS[step.operator] if in_words else step.operator
    line = f"{step.left} {operator} {step.right} {'is' if in_words else '='} {step.result}."
    return f"{connective} {line}" if connective else line


def _write(steps: Sequence[Step], rng: random.Random) -> Reply:
    in_words = rng.random() < 0.4
    connectives = ["", *(rng.choice(_CONNECTIVES) for _ in steps[1:])]
    sentences = tuple(_written(s, in_words, c) for s, c in zip(steps, connectives, strict=True))
    return Reply(rng.choice(_OPENINGS), sentences, tuple(steps), f"{rng.choice(_CLOSINGS)} {steps[-1].result}")


def plain_reply(problem: Problem) -> str:
    """Return the exact solution in the plain style of the judge's own reference answers."""
    sentences = tuple(_written(step, in_words=False, connective="") for step in problem.steps)
    return Reply("", sentences, problem.steps, f"The answer is {problem.answer}").text


def _rework(steps: Sequence[Step], index: int, changed: Step) -> tuple[Step, ...]:
    """Replace step `index`, and propagate its new result to later steps that used the old one."""
    # Later steps are computed exactly from the wrong number, as a person would continue.
    done = [*steps[:index], changed]
    for step in steps[index + 1 :]:
        old, new = steps[index].result, changed.result
        left = new if step.left == old else step.left
        right = new if step.left != old and step.right == old else step.right
        done.append(Step.worked(left, step.operator, right))
    return tuple(done)


def _slipped(step: Step, rng: random.Random) -> Step:
    return replace(step, result=step.result + rng.choice((-10, -3, -2, -1, -1, 1, 1, 2, 3, 10)))


def _slip(problem: Problem, rng: random.Random) -> tuple[Step, ...]:
    index = rng.randrange(len(problem.steps))
    return _rework(problem.steps, index, _slipped(problem.steps[index], rng))


def _wrong_operand(problem: Problem, rng: random.Random) -> tuple[Step, ...]:
    index = rng.randrange(len(problem.steps))
    step = problem.steps[index]
    # Another number of the problem, or one slightly off.
    others = [number for number in problem.numbers if number] + [step.right + rng.choice((-2, -1, 1, 2))]
    right = rng.choice(others)
    changed = Step.worked(step.left, step.operator, right)
    return _rework(problem.steps, index, changed)


def _missed(problem: Problem, rng: random.Random) -> tuple[Step, ...]:
    return problem.steps[:-1]


def _extra(problem: Problem, rng: random.Random) -> tuple[Step, ...]:
    number = rng.choice([n for n in problem.numbers if n])
    return (*problem.steps, Step.worked(problem.answer, rng.choice("+-"), number))


def _misread(problem: Problem, rng: random.Random) -> tuple[Step, ...]:
    return problem.misread_steps() or ()


_MAKERS = {"misreading": _misread, "operand": _wrong_operand, "slip": _slip, "missed": _missed, "extra": _extra}


def wrong_steps(
    problem: Problem, rng: random.Random, kinds: Mapping[str, float] = MappingProxyType(ERROR_KINDS)
) -> tuple[Step, ...]:
    """Return steps with a wrong answer, all numbers in 0..60, with an error type drawn by the weights in `kinds`."""
    while True:
        kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
        steps = _MAKERS[kind](problem, rng)
        # A wrong step may still lead to the right answer; such steps are redrawn.
        if steps and steps[-1].result != problem.answer and all(0 <= s.result <= LARGEST and s.in_range for s in steps):
            return steps


def draw_reply(
    problem: Problem,
    rng: random.Random,
    *,
    right: bool | None = None,
    kinds: Mapping[str, float] = MappingProxyType(ERROR_KINDS),
) -> Reply:
    """Draw a reply in a random style; right with probability `RIGHT_SHARE` unless `right` is given."""
    is_right = rng.random() < RIGHT_SHARE if right is None else right
    return _write(problem.steps if is_right else wrong_steps(problem, rng, kinds), rng)


def draw_sum(rng: random.Random) -> tuple[str, bool]:
    """Return one step of a random problem as a sentence, with a wrong result in half of the cases, and whether it is exact."""
    exact = rng.choice(draw_problem(rng).steps)
    step = _slipped(exact, rng) if rng.random() < 0.5 else exact
    if not step.in_range:
        return draw_sum(rng)
    return _written(step, in_words=rng.random() < 0.4, connective=rng.choice(_CONNECTIVES)), step.is_exact
