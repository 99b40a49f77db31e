"""The gold oracle of the word problems: reads a question, works it out exactly, and checks a reply's final answer.

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
        """The exact answer, or None when the question is not a well-posed one of this domain."""
        problem = read_problem(question)
        return None if problem is None else problem.answer

    def is_right(self, question: str, reply: str) -> bool | None:
        """Whether the reply ends on the exact answer; None when the question has no gold."""
        answer = self.answer(question)
        if answer is None:
            return None
        found = _ANSWER.search(reply.strip())
        return found is not None and int(found.group(1)) == answer
