"""Gold: a domain installed under the entry point group `selfeval.domains`, or a file of answers or labels.

Only evaluation reads it. The file has JSON lines: `{"question": "...", "answer": "..."}`, where a right reply has to end in
the answer (`quality/answers.py`), or `{"question": "...", "reply": "...", "label": true}`, which covers only that reply.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from selfeval.config import RunConfig, nearest
from selfeval.errors import ConfigError, DataError
from selfeval.quality.answers import is_answer
from selfeval.stages.conversations import conversation_text, read_messages
from selfeval.stages.given import has_answers
from selfeval.store import file_hash
from selfeval.texts import json_lines, read_text, shortened

__all__ = ["FileGold", "Gold", "check_domain", "check_gold", "gold_file", "gold_key", "load_gold"]

_GROUP = "selfeval.domains"
_LARGEST = 1 << 30
_EXAMPLE = '{"question": "...", "answer": "..."}'


class Gold(Protocol):
    """An oracle that no training step ever sees."""

    name: str

    def is_right(self, question: str, reply: str) -> bool | None:
        """Return whether the reply is right; None if the question has no gold."""
        ...


class FileGold:
    """Gold answers or labels from a file.

    Args:
        path: path of the file.
        partial: accept lines that have only a question. Default: False.

    Raises:
        DataError: the file is missing or malformed; the message names the line.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.name = path.name
        self._answers: dict[str, tuple[str, ...]] = {}
        self._labels: dict[tuple[str, str], bool] = {}
        text = read_text(path, "gold file", DataError, most=_LARGEST, remedy=f"use JSON lines ({_EXAMPLE})")
        for number, values in json_lines(text, str(path), DataError, _EXAMPLE):
            if not partial or values.get("answer") not in (None, ""):
                self._add(values, f"{path}, line {number}")
        if not self.questions:
            raise DataError(f"gold file {path} is empty; write one {_EXAMPLE} per line")

    @property
    def questions(self) -> frozenset[str]:
        """The questions in the file, normalised by `_plain`."""
        return frozenset(self._answers) | {question for question, _ in self._labels}

    def knows(self, question: str) -> bool:
        return _plain(question) in self.questions

    def is_right(self, question: str, reply: str) -> bool | None:
        """Return the reply's label if it has one, else whether it ends in the answer; None if the file has neither."""
        known = _plain(question)
        label = self._labels.get((known, _plain(reply)))
        if label is not None:
            return label
        # A label is about one reply; an answer covers all others to the question.
        answers = self._answers.get(known)
        return None if answers is None else is_answer(reply, answers)

    def _add(self, values: dict[str, Any], where: str) -> None:
        shown = shortened(json.dumps(values, ensure_ascii=False))
        question = _asked(values)
        if not isinstance(question, str) or not question.strip():
            raise DataError(f'{where}: missing or empty "question"; got {shown}; write {_EXAMPLE}')
        known = _plain(question)
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
            raise DataError(f'{where}: expected an "answer", or a "reply" with a "label" of true or false; got {shown}')
        if self._labels.setdefault((known, _plain(reply)), bool(label)) != bool(label):
            raise DataError(f"{where}: an earlier line has a different label for the same reply; got {shown}")


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


def check_gold(config: RunConfig, questions: Sequence[str] | None) -> None:
    """Refuse unusable gold before any work is done.

    Args:
        config: configuration of the run.
        questions: test questions of the user's own file; None if the model writes them.

    Raises:
        ConfigError: the domain is not installed, both are given, or the questions are not known before they are written.
        DataError: the file is missing or malformed, or has none of the test questions.
    """
    domain, path = config.domain, config.gold
    # Before the file: a misspelt domain is the cheaper check.
    check_domain(domain)
    if not path:
        _of_file(gold_file(config), config)  # answers among the questions are checked, and may be about training questions only
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
    gold = _of_file(path, config)
    if gold is None or not any(gold.knows(question) for question in questions):
        raise DataError(
            f"gold file {path} contains none of this run's {len(questions)} test questions, on which figures by gold are "
            'measured; the texts must match exactly, and "split": "test" makes a question a test question'
        )


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


def load_gold(config: RunConfig) -> Gold | None:
    """Load the gold oracle of the domain or the file; None without either.

    Raises:
        ConfigError: no such domain is installed; from `is_right`, an answer other than yes, no or unknown.
        DataError: the file is missing or malformed.
    """
    if gold := _of_file(gold_file(config), config):
        return gold
    domain = config.domain
    if domain is None:
        return None
    # The entry point names a class: the second call creates the oracle.
    return _Answers(domain, cast(Gold, _installed(domain).load()()))


def _of_file(path: str, config: RunConfig) -> FileGold | None:
    # In a file of questions, answers are optional: those lines that have one are gold.
    return FileGold(Path(path), partial=path == config.questions.file) if path else None


class _Answers:
    """Adapter of a domain that returns only True, False or None.

    Domains come from other packages. An answer of 1, or numpy's True, is converted. An answer of 0.5 is refused, because it
    would count as right wherever it is used as a condition.
    """

    def __init__(self, domain: str, gold: Gold) -> None:
        self.name, self._domain, self._gold = gold.name, domain, gold

    def is_right(self, question: str, reply: str) -> bool | None:
        answer: object = self._gold.is_right(question, reply)
        if answer is None:
            return None
        if answer not in (True, False):
            raise ConfigError(
                f'domain "{self._domain}" returned {answer!r}; its is_right must return True, False, or None for an unknown '
                "question"
            )
        return bool(answer)
