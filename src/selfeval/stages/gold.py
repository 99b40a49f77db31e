"""Gold: a domain installed under the entry point group `selfeval.domains`, or a file of answers, labels or unit tests.

Only evaluation reads it. The file has JSON lines: `{"question": "...", "answer": "..."}`, where a right reply has to end in
the answer (`quality/answers.py`), `{"question": "...", "reply": "...", "label": true}`, which covers only that reply, or
`{"question": "...", "tests": ["assert f(2) == 4"]}`, where the code of the reply has to pass the tests (`execution/`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from selfeval.config import RunConfig, nearest
from selfeval.errors import ConfigError, DataError
from selfeval.execution.sandbox import Outcome, check_sandbox, run_programs
from selfeval.execution.tasks import CodeTask, code_task, has_tests, syntax_error, task_question
from selfeval.grounding import question_with_passage
from selfeval.quality.answers import is_answer
from selfeval.runs.conversations import conversation_text, read_messages
from selfeval.stages.given import has_answers
from selfeval.store import file_hash
from selfeval.texts import json_lines, read_text, shortened, visible

__all__ = [
    "FileGold",
    "Gold",
    "ask_ahead",
    "check_domain",
    "check_gold",
    "count_outcomes",
    "gold_file",
    "gold_key",
    "load_gold",
    "right_steps_of",
]

_LOGGER = logging.getLogger(__name__)
_GROUP = "selfeval.domains"
_LARGEST = 1 << 30
_EXAMPLE = '{"question": "...", "answer": "..."}'


class Gold(Protocol):
    """An oracle that no training step ever sees."""

    name: str

    def is_right(self, question: str, reply: str) -> bool | None:
        """Return whether the reply is right; None if the question has no gold."""
        ...


def right_steps_of(gold: Gold | None) -> Callable[[str, Sequence[str]], Sequence[bool] | None] | None:
    """Return the method `right_steps(question, steps)` of a gold domain, which not every domain has; None without it.

    It returns for each step of a reply whether the reply is right up to its end, or None for a question without gold.
    """
    return getattr(gold.inner if isinstance(gold, _Answers) else gold, "right_steps", None)


class FileGold:
    """Gold answers, labels or unit tests from a file.

    Args:
        path: path of the file.
        partial: accept lines that have only a question. Default: False.
        allow_code_execution: the user agreed that unit tests are run. Default: False.

    Raises:
        DataError: the file is missing or malformed; the message names the line.
        ConfigError: the file has unit tests, and the user has not agreed to run them.
    """

    def __init__(self, path: Path, *, partial: bool = False, allow_code_execution: bool = False) -> None:
        self.name, self._path = path.name, path
        self._answers: dict[str, tuple[str, ...]] = {}
        self._labels: dict[tuple[str, str], bool] = {}
        self._tasks: dict[str, CodeTask] = {}
        self._task_lines: dict[str, str] = {}
        self._tested: dict[tuple[str, str], Outcome] = {}
        text = read_text(path, "gold file", DataError, most=_LARGEST, remedy=f"use JSON lines ({_EXAMPLE})")
        for number, values in json_lines(text, str(path), DataError, _EXAMPLE):
            if not partial or values.get("answer") not in (None, "") or has_tests(values):
                self._add(values, f"{path}, line {number}")
        if not self.questions:
            raise DataError(f"gold file {path} is empty; write one {_EXAMPLE} per line")
        if self._tasks and not allow_code_execution:
            raise ConfigError(
                f"gold file {path} has unit tests, which execute code that a model wrote; pass --allow-code-execution "
                "(allow_code_execution=True in Python) to run it in a sandbox, or remove the tests"
            )

    @property
    def questions(self) -> frozenset[str]:
        """The questions in the file, normalised by `_plain`."""
        return frozenset(self._answers) | frozenset(self._tasks) | {question for question, _ in self._labels}

    @property
    def runs_code(self) -> bool:
        """Whether the file has unit tests."""
        return bool(self._tasks)

    def knows(self, question: str) -> bool:
        return _plain(question) in self.questions

    def is_right(self, question: str, reply: str) -> bool | None:
        """Return the reply's label if it has one, else whether it passes the tests or ends in the answer; None without gold."""
        known = _plain(question)
        label = self._labels.get((known, _plain(reply)))
        if label is not None:
            return label
        if known in self._tasks:
            self.run_tests([(question, reply)])
            return self._tested[known, reply].passed
        # A label is about one reply; an answer covers all others to the question.
        answers = self._answers.get(known)
        return None if answers is None else is_answer(reply, answers)

    @property
    def outcomes(self) -> Counter[str]:
        """Number of tested replies by the reason of their outcome; a reply that was sampled twice to a question counts once."""
        return Counter(outcome.reason for outcome in self._tested.values())

    def check_tests(self) -> None:
        """Check that this system has a sandbox, and that the code in the file compiles.

        Raises:
            ConfigError: there is no sandbox.
            DataError: code does not compile, so no reply could pass.
        """
        check_sandbox()
        if problem := syntax_error({f"entry of {self._task_lines[known]}": task for known, task in self._tasks.items()}):
            raise DataError(f"gold file {self._path} has tests that no reply can pass: {visible(problem)}; correct them")

    def run_tests(self, cases: Sequence[tuple[str, str]]) -> None:
        """Run the tests of questions and replies, side by side, unless their results are known or they have no tests.

        Args:
            cases: questions with replies.
        """
        named = dict.fromkeys((_plain(question), reply) for question, reply in cases)
        wanted = [case for case in named if case[0] in self._tasks and case not in self._tested]
        programs = {case: program for case in wanted if (program := self._tasks[case[0]].program(case[1]))}
        outcomes = dict(zip(programs, run_programs(list(programs.values())), strict=True))
        for case in wanted:
            self._tested[case] = outcome = outcomes.get(case, Outcome("no code"))
            _LOGGER.debug("unit tests: %s %s; reply to %r", outcome.reason, visible(outcome.detail), case[0])

    def _add(self, values: dict[str, Any], where: str) -> None:
        shown = shortened(json.dumps(values, ensure_ascii=False))
        question = task_question(values) or question_with_passage(values) or _asked(values)
        if not isinstance(question, str) or not question.strip():
            raise DataError(f'{where}: missing or empty "question"; got {shown}; write {_EXAMPLE}')
        known = _plain(question)
        if has_tests(values):
            self._add_task(known, values, where)
            return
        if "answer" in values:
            answers = _answers(values["answer"])
            if answers is None:
                raise DataError(f'{where}: "answer" must be a string, a number or a list of them; got {shown}')
            if self._answers.setdefault(known, answers) != answers:
                raise DataError(f"{where}: an earlier line has a different answer to the same question; got {shown}")
            return
        reply, label = values.get("reply"), values.get("label")
        # JSON labels may be true and false, or 1 and 0; True == 1, so the membership test covers both.
        if not isinstance(reply, str) or not isinstance(label, bool | int) or label not in (0, 1):
            raise DataError(
                f'{where}: expected an "answer", a "reply" with a "label" of true or false, or "tests"; got {shown}'
            )
        if self._labels.setdefault((known, _plain(reply)), bool(label)) != bool(label):
            raise DataError(f"{where}: an earlier line has a different label for the same reply; got {shown}")

    def _add_task(self, known: str, values: dict[str, Any], where: str) -> None:
        shown = shortened(json.dumps(values, ensure_ascii=False))
        try:
            task = code_task(values)
        except ValueError as problem:
            raise DataError(f"{where}: {problem}; got {shown}") from problem
        assert task is not None
        if values.get("answer") not in (None, "") or known in self._answers:
            raise DataError(f"{where}: the question has both an answer and tests; keep one of them; got {shown}")
        self._task_lines.setdefault(known, where.rpartition(", ")[2])
        if self._tasks.setdefault(known, task) != task:
            raise DataError(f"{where}: an earlier line has different tests for the same question; got {shown}")


def _asked(values: dict[str, Any]) -> Any:
    """Return the question of a line as the text that a run knows it by."""
    found = next((values[name] for name in ("question", "prompt", "messages") if name in values), None)
    try:
        return conversation_text(read_messages(found)) if isinstance(found, list) else found
    except ValueError:
        return None


def _plain(text: str) -> str:
    """Normalise white space before comparing texts."""
    return " ".join(text.split())


def _answers(value: Any) -> tuple[str, ...] | None:
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(v, str | int | float) and not isinstance(v, bool) and str(v).strip() for v in found):
        return None
    return tuple(str(v) for v in found)


def _installed(domain: str) -> EntryPoint:
    found = {point.name: point for point in entry_points(group=_GROUP)}
    if domain not in found:
        raise ConfigError(f'domain "{domain}" is not installed{nearest(domain, list(found))}')
    return found[domain]


def check_domain(domain: str | None) -> None:
    """Check that a domain is installed, without loading its oracle.

    Raises:
        ConfigError: no such domain is installed.
    """
    if domain is not None:
        _installed(domain)


def gold_file(config: RunConfig) -> str:
    """Return the path of the gold file: `gold`, otherwise `questions.file` if it has answers; empty without one.

    With a domain, the answers of a file of questions are not read.

    Raises:
        DataError: the file of questions is missing or malformed; the message names the line.
    """
    own = config.questions.file
    if config.gold or config.domain is not None or not own:
        return config.gold
    return own if has_answers(Path(own)) else ""


def check_gold(config: RunConfig, questions: Sequence[str] | None, *, allow_code_execution: bool = False) -> None:
    """Refuse unusable gold before any work is done.

    Args:
        config: configuration of the run.
        questions: test questions of the user's own file; None if the model writes them.
        allow_code_execution: the user agreed that unit tests are run. Default: False.

    Raises:
        ConfigError: the domain is not installed, both are given, the questions are not known before they are written, or unit
            tests are not allowed or cannot be run on this system.
        DataError: the file is missing or malformed, has tests that do not compile, or none of the test questions.
    """
    domain, path = config.domain, config.gold
    # Before the file: a misspelt domain is the cheaper check.
    check_domain(domain)
    if not path:
        # Answers among the questions are checked, and may be about training questions only.
        _check_runnable(_of_file(gold_file(config), config, allow_code_execution))
        return
    if domain is not None:
        raise ConfigError(
            f'domain = "{domain}" and gold = "{path}" are both set; remove one (--set domain=none unsets that of a recipe)'
        )
    if questions is None:
        raise ConfigError(
            f"gold = {path} identifies questions by their text, but the model would generate new ones; also set "
            "questions.file, replies.file or pairs.file (a file of questions with answers can serve as both), or use a domain"
        )
    gold = _of_file(path, config, allow_code_execution)
    _check_runnable(gold)
    if gold is None or not any(gold.knows(question) for question in questions):
        raise DataError(
            f"gold file {path} contains none of this run's {len(questions)} test questions, on which figures by gold are "
            'measured; the texts must match exactly, and "split": "test" makes a question a test question'
        )


def _check_runnable(gold: FileGold | None) -> None:
    if gold is not None and gold.runs_code:
        gold.check_tests()


def gold_key(config: RunConfig) -> str:
    """Return a hash of the content of the gold file; empty without one.

    Raises:
        DataError: the file cannot be read.
    """
    path = gold_file(config)
    try:
        return file_hash(Path(path)) if path else ""
    except OSError as error:
        raise DataError(f"gold file {path} cannot be read: {error.strerror or error}") from error


def load_gold(config: RunConfig, *, allow_code_execution: bool = False) -> Gold | None:
    """Load the gold oracle of the domain or the file; None without either.

    Args:
        config: configuration of the run.
        allow_code_execution: the user agreed that unit tests are run. Default: False.

    Raises:
        ConfigError: no such domain is installed, or unit tests are not allowed; from `is_right`, an answer other than yes, no
            or unknown.
        DataError: the file is missing or malformed.
    """
    if gold := _of_file(gold_file(config), config, allow_code_execution):
        return gold
    domain = config.domain
    if domain is None:
        return None
    # The entry point names a class: the second call creates the oracle.
    return _Answers(domain, cast(Gold, _installed(domain).load()()))


def ask_ahead(gold: Gold | None, cases: Sequence[tuple[str, str]]) -> None:
    """Run the unit tests of replies side by side, so that asking gold about each of them later takes no time.

    Args:
        gold: gold of any kind; only that of a file with tests does something.
        cases: questions with replies.
    """
    if isinstance(gold, FileGold) and gold.runs_code:
        gold.run_tests(cases)


def count_outcomes(gold: Gold | None) -> Counter[str] | None:
    """Return the number of replies that gold has tested so far, by the reason of their outcome; None without unit tests."""
    return gold.outcomes if isinstance(gold, FileGold) and gold.runs_code else None


def _of_file(path: str, config: RunConfig, allow_code_execution: bool) -> FileGold | None:
    if not path:
        return None
    # In a file of questions, answers are optional: those lines that have one are gold.
    is_partial = path == config.questions.file
    return FileGold(Path(path), partial=is_partial, allow_code_execution=allow_code_execution)


class _Answers:
    """Adapter of a domain that returns only True, False or None.

    Domains come from other packages. An answer of 1, or numpy's True, is converted. An answer of 0.5 is refused, because it
    would count as right wherever it is used as a condition.
    """

    def __init__(self, domain: str, gold: Gold) -> None:
        self.name, self._domain, self.inner = gold.name, domain, gold

    def is_right(self, question: str, reply: str) -> bool | None:
        answer: object = self.inner.is_right(question, reply)
        if answer is None:
            return None
        if answer not in (True, False):
            raise ConfigError(
                f'domain "{self._domain}" returned {answer!r}; its is_right must return True, False, or None for an unknown '
                "question"
            )
        return bool(answer)
