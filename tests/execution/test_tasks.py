"""Tasks in the formats of MBPP and HumanEval, and their public data sets where they are present."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

from selfeval.execution.sandbox import Outcome, run_programs
from selfeval.execution.tasks import code_task, has_tests, task_question
from shared_data import shared_lines

OWN = {"question": "Write double(x).", "tests": ["assert double(2) == 4"], "setup": "import math"}
MBPP = {
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(3) == 6"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {"prompt": MBPP["text"], "test_list": MBPP["test_list"], "test_imports": ["import math"]}
HUMAN_EVAL = {
    "task_id": "HumanEval/x",
    "prompt": 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef double(x):\n    """Return twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
}


pytestmark = pytest.mark.usefixtures("available_sandbox")


def _run(values: dict[str, Any], *replies: str) -> list[Outcome]:
    task = code_task(values)
    assert task is not None
    programs = [program for reply in replies if (program := task.program(reply))]
    assert len(programs) == len(replies)
    return run_programs(programs)


RIGHT, WRONG = "def double(x):\n    return x + x", "def double(x):\n    return x * x * x"


@pytest.mark.parametrize("values", [OWN, MBPP, SANITIZED, HUMAN_EVAL])
def test_a_reply_passes_the_tests_of_its_task(values: dict[str, Any]) -> None:
    fenced = f"Sure:\n```python\n{RIGHT}\n```"
    assert [o.reason for o in _run(values, RIGHT, fenced, WRONG, "I cannot.")] == ["passed", "passed", "failed", "syntax"]


def test_a_reply_may_continue_a_function_of_human_eval() -> None:
    replies = ("    return 2 * x", "return 4 * half(x)", "```python\nreturn math.floor(2 * x)\n```", "    return x")
    assert [outcome.reason for outcome in _run(HUMAN_EVAL, *replies)] == ["passed", "passed", "passed", "failed"]


def test_a_whole_function_may_use_what_the_prompt_defines() -> None:
    assert [outcome.reason for outcome in _run(HUMAN_EVAL, "def double(x):\n    return 4 * half(x)")] == ["passed"]


def test_the_setup_of_mbpp_uses_the_reply() -> None:
    task = {**MBPP, "test_setup_code": "tree = Node(3)", "test_list": ["assert depth(tree) == 3"]}
    reply = "class Node:\n    def __init__(self, n): self.n = n\ndef depth(t): return t.n"
    assert [outcome.reason for outcome in _run(task, reply)] == ["passed"]


def test_the_question_of_mbpp_shows_one_test() -> None:
    expected = "Write a function to double a number.\n\nThe code must pass this test:\nassert double(2) == 4"
    assert task_question(MBPP) == task_question(SANITIZED) == expected
    assert task_question({**MBPP, "question": "My own"}) is None
    assert task_question(HUMAN_EVAL) is None


@pytest.mark.parametrize(
    "values", [{"question": "Why?"}, {"question": "Why?", "test": True, "tests": []}, {"prompt": "x", "test": "a", "answer": 3}]
)
def test_other_lines_have_no_tests(values: dict[str, Any]) -> None:
    assert not has_tests(values)
    assert code_task(values) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({**OWN, "tests": 3}, '"tests" must be a list of strings with code'),
        ({**OWN, "tests": ["assert f()", ""]}, '"tests" must be a list of strings with code'),
        ({**OWN, "setup": ["import math"]}, '"setup" must be a string'),
        ({**HUMAN_EVAL, "entry_point": "triple"}, '"prompt" must be the beginning of the function that "entry_point" names'),
        ({**HUMAN_EVAL, "entry_point": "double) or (1"}, '"prompt" must be the beginning of the function'),
    ],
)
def test_malformed_tests_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        code_task(values)


# -- the public data sets -----------------------------------------------------------------------------------------------


def _outcomes(rows: list[dict[str, Any]], replies: list[str]) -> list[Outcome]:
    programs = [task.program(reply) for row, reply in zip(rows, replies, strict=True) if (task := code_task(row))]
    return run_programs([program for program in programs if program is not None])


def _mutated(whole: str, name: str) -> str:
    return f"{whole}\n\n_right = {name}\ndef {name}(*values): return [_right(*values)]\n"


def _fails(rows: list[dict[str, Any]], replies: list[str]) -> list[str]:
    outcomes = _outcomes(rows, replies)
    assert len(outcomes) == len(rows)
    return [row["task_id"] for row, outcome in zip(rows, outcomes, strict=True) if not outcome.passed]


def _check_human_eval(rows: list[dict[str, Any]]) -> None:
    bodies = [row["canonical_solution"] for row in rows]
    wholes = [row["prompt"] + body for row, body in zip(rows, bodies, strict=True)]
    assert _fails(rows, bodies) == []
    assert _fails(rows, [body.strip() for body in bodies]) == []
    assert _fails(rows, [f"Here:\n```python\n{textwrap.dedent(body)}```\nDone." for body in bodies]) == []
    assert _fails(rows, [f"Here it is:\n{whole.rstrip()}\nThis works because it does." for whole in wholes]) == []
    mutated = [_mutated(whole, row["entry_point"]) for row, whole in zip(rows, wholes, strict=True)]
    assert len(_fails(rows, mutated)) == len(rows)


def _tested_function(row: dict[str, Any]) -> str:
    task = code_task(row)
    assert task is not None
    return next(name for name in sorted(task.names) if f"def {name}" in row["code"])


def _check_mbpp(rows: list[dict[str, Any]]) -> None:
    assert _fails(rows, [row["code"] for row in rows]) == []
    names = [_tested_function(row) for row in rows]
    mutated = [_mutated(row["code"], name) for row, name in zip(rows, names, strict=True)]
    assert len(_fails(rows, mutated)) == len(rows)


def test_a_few_solutions_of_human_eval_pass_and_their_mutants_fail() -> None:
    _check_human_eval(shared_lines("code/HumanEval.jsonl.gz")[38:160:60])


def test_a_few_solutions_of_mbpp_pass_and_their_mutants_fail() -> None:
    _check_mbpp(shared_lines("code/mbpp.jsonl.xz")[5:900:200])


@pytest.mark.slow
def test_all_solutions_of_human_eval_pass_and_their_mutants_fail() -> None:
    _check_human_eval(shared_lines("code/HumanEval.jsonl.gz"))


@pytest.mark.slow
def test_a_sample_of_mbpp_passes_and_its_mutants_fail() -> None:
    rows = shared_lines("code/mbpp.jsonl.xz")
    _check_mbpp([row for row in rows if row["test_setup_code"]] + rows[::10])
