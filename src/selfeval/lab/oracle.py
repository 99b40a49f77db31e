"""The gold oracle of the word problems: parses a question, solves it exactly, and checks the final answer of a reply.

Only evaluation (through the entry point `selfeval.domains`) and the lab itself import this module.
"""

from __future__ import annotations

import re

from selfeval.lab.domain import read_problem

__all__ = ["WordProblems"]

_ANSWER = re.compile(r"[Tt]he answer is (\d+)\W*$")


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
