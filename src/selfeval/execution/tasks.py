"""Tasks whose gold is unit tests: the lines of MBPP and HumanEval, and the package's own.

| format | fields |
|---|---|
| own | `question` (or `prompt`), `tests` (a list of code, or one text), optional `setup` (code before the reply's) |
| MBPP | `text` (or `prompt`), `test_list`, optional `test_setup_code` (after the reply's code), `test_imports` (before it) |
| HumanEval | `prompt` (the beginning of a function), `test` (defines `check`), `entry_point` (name of the function) |
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfeval.execution.reply_code import continuations, defines, programs_of
from selfeval.execution.sandbox import Limits, Program, run_program

__all__ = ["CodeTask", "code_task", "has_tests", "syntax_error", "task_question"]

_CALLED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s*\(")
_LONG = Limits(cpu_seconds=120, seconds=300.0, memory_bytes=4 << 30)
_NOT_A_NAME = {
    *dir(builtins),
    "assert",
    "not",
    "and",
    "or",
    "in",
    "is",
    "if",
    "else",
    "for",
    "lambda",
    "return",
    "def",
    "class",
}


@dataclass(frozen=True)
class CodeTask:
    """The tests of a question.

    Attributes:
        tests: code of the tests.
        names: functions and classes that the tests use.
        preamble: code before that of the reply.
        setup: code between that of the reply and the tests.
        stub: beginning of the function that the reply may continue; empty if there is none.
    """

    tests: tuple[str, ...]
    names: frozenset[str]
    preamble: str = ""
    setup: str = ""
    stub: str = ""

    def program(self, reply: str) -> Program | None:
        """Return the program of a reply; None if it has no code."""
        programs = programs_of(reply, self.names)
        if self.stub and not any(defines(program, self.names) for program in programs):
            programs = continuations(self.stub, reply, programs)
        return Program(programs, self.tests, self.preamble, self.setup) if programs else None


def syntax_error(tasks: Mapping[str, CodeTask]) -> str | None:
    """Return a message on the first task whose own code does not compile, or None if all of it does.

    It is compiled in the sandbox, because a file of tasks may be as hostile as a reply.

    Args:
        tasks: tasks by the name that the message uses for them.
    """
    parts = [(name, part) for name, task in tasks.items() for part in (task.preamble, task.setup, *task.tests)]
    test = "for name, part in parts: compile(part, name, 'exec')"
    outcome = run_program(Program((f"parts = {parts!r}",), (test,)), _LONG)
    return None if outcome.passed else outcome.detail


def has_tests(values: Mapping[str, Any]) -> bool:
    """Return whether a line of a file is a task with unit tests."""
    return _form(values) is not None


def _form(values: Mapping[str, Any]) -> str | None:
    if values.get("tests") not in (None, "", []):
        return "own"
    if values.get("test_list") not in (None, []):
        return "mbpp"
    return "human_eval" if isinstance(values.get("entry_point"), str) and isinstance(values.get("test"), str) else None


def task_question(values: Mapping[str, Any]) -> str | None:
    """Return the question of a line of MBPP that has no `question`; None for any other line.

    It contains the first test, without which no reply could know the name of the function.
    """
    text = values.get("text", values.get("prompt"))
    if "question" in values or _form(values) != "mbpp" or not isinstance(text, str) or not text.strip():
        return None
    return f"{text.strip()}\n\nThe code must pass this test:\n{_texts(values, 'test_list')[0].strip()}"


def code_task(values: Mapping[str, Any]) -> CodeTask | None:
    """Return the tests of a line; None if it has none.

    Raises:
        ValueError: they are malformed; the message says how.
    """
    form = _form(values)
    if form == "own":
        tests = _texts(values, "tests")
        return CodeTask(tests, _names(tests), preamble=_code(values, "setup"))
    if form == "mbpp":
        tests = _texts(values, "test_list")
        imports = "\n".join(_texts(values, "test_imports")) if values.get("test_imports") else ""
        return CodeTask(tests, _names(tests), preamble=imports, setup=_code(values, "test_setup_code"))
    return _human_eval(values) if form == "human_eval" else None


def _human_eval(values: Mapping[str, Any]) -> CodeTask:
    stub, name = _code(values, "prompt"), _code(values, "entry_point")
    if not name.isidentifier() or not defines(stub, [name]):
        raise ValueError(f'"prompt" must be the beginning of the function that "entry_point" names, got "{name}"')
    # The stub is a function with a docstring; it is defined for the imports and the other functions around it.
    tests = (_code(values, "test"), f"check({name})")
    return CodeTask(tests, frozenset([name]), preamble=f"{stub.rstrip()}\n    pass\n", stub=stub)


def _code(values: Mapping[str, Any], field: str) -> str:
    found = values.get(field) or ""
    if not isinstance(found, str):
        raise ValueError(f'"{field}" must be a string')
    return found.replace("\r\n", "\n")


def _texts(values: Mapping[str, Any], field: str) -> tuple[str, ...]:
    found = values.get(field)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f'"{field}" must be a list of strings with code')
    return tuple(text.replace("\r\n", "\n") for text in texts)


def _names(tests: tuple[str, ...]) -> frozenset[str]:
    """Return the names that the tests call, apart from builtins."""
    return frozenset(name for test in tests for name in _CALLED.findall(test) if name not in _NOT_A_NAME)
