"""The gold oracle of the word problems: parses a question, solves it exactly, and checks the final answer of a reply.

Only evaluation (through the entry point `selfeval.domains`) and the lab itself import this module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from selfeval.lab.domain import Step, read_problem

__all__ = ["WordProblems"]

_ANSWER = re.compile(r"[Tt]he answer is (\d+)\W*$")
_EQUATION = re.compile(r"(\d+) (\+|-|\*|/|plus|minus|times|divided by) (\d+) (?:=|is) (\d+)")
_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}


class WordProblems:
    """Gold of the word-problem domain."""

    name = "word-problems"

    def answer(self, question: str) -> int | None:
        """Return the exact answer, or None if the question is not a well-posed question of this domain."""
        problem = read_problem(question)
        return None if problem is None else problem.answer

    def is_right(self, question: str, reply: str) -> bool | None:
        """Return whether the final answer of the reply is exact; None if the question has no gold answer."""
        answer = self.answer(question)
        if answer is None:
            return None
        found = _ANSWER.search(reply.strip())
        return found is not None and int(found.group(1)) == answer

    def right_steps(self, question: str, steps: Sequence[str]) -> list[bool] | None:
        """Return, for each step of a reply, whether the reply is right so far; None if the question has no gold answer.

        Equations must be those of the exact solution, in its order; factors and summands may be swapped. The final answer must
        be exact. A step without numbers is right if the one before it is, and any other step with numbers is wrong.

        Args:
            question: the question.
            steps: texts that, joined, are the reply or its beginning.
        """
        problem = read_problem(question)
        if problem is None:
            return None
        left, right, found = list(problem.steps), True, []
        for text in steps:
            equations, answer = _equations(text), _ANSWER.search(text.strip())
            right &= len(equations) <= len(left) and all(map(_is_same, equations, left))
            del left[: len(equations)]
            rest = _EQUATION.sub("", text[: answer.start()] if answer else text)
            right &= not re.search(r"\d", rest) and (answer is None or int(answer[1]) == problem.answer)
            found.append(right)
        return found


def _equations(text: str) -> list[Step]:
    found = _EQUATION.findall(text)
    return [Step(int(a), _OPERATORS.get(operator, operator), int(b), int(c)) for a, operator, b, c in found]


def _is_same(step: Step, exact: Step) -> bool:
    turned = Step(step.right, step.operator, step.left, step.result)
    return step == exact or (step.operator in "+*" and turned == exact)
