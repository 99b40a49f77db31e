"""Gold: a domain installed under the entry point group `selfeval.domains`, or a file of answers or labels.

Evaluation alone asks it. The file has JSON lines: `{"question": "...", "answer": "..."}`, whose answer a reply has to end in
(`quality/answers.py`), or `{"question": "...", "reply": "...", "label": true}`, which knows just that reply.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, cast

from selfeval.config import nearest
from selfeval.errors import ConfigError, DataError
from selfeval.quality.answers import is_answer
from selfeval.store import file_hash
from selfeval.texts import json_lines, read_text, shortened

__all__ = ["FileGold", "Gold", "check_domain", "check_gold", "gold_key", "load_gold"]

_GROUP = "selfeval.domains"
_LARGEST = 1 << 30
_EXAMPLE = '{"question": "...", "answer": "..."}'


class Gold(Protocol):
    """An oracle that no training step ever sees."""

    name: str

    def is_right(self, question: str, reply: str) -> bool | None:
        """Whether the reply is right; None when the question has no gold."""
        ...


class FileGold:
    """Gold answers or labels from a file.

    Args:
        path: of the file.

    Raises:
        DataError: it is missing or malformed; the message names the line.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._answers: dict[str, tuple[str, ...]] = {}
        self._labels: dict[tuple[str, str], bool] = {}
        text = read_text(path, "gold file", DataError, most=_LARGEST, remedy=f"give JSON lines ({_EXAMPLE})")
        for number, values in json_lines(text, str(path), DataError, _EXAMPLE):
            self._add(values, f"{path}, line {number}")
        if not self.questions:
            raise DataError(f"gold file {path} is empty; write {_EXAMPLE}, one a line")

    @property
    def questions(self) -> frozenset[str]:
        """The questions that it knows, as `_plain` gives them."""
        return frozenset(self._answers) | {question for question, _ in self._labels}

    def knows(self, question: str) -> bool:
        return _plain(question) in self.questions

    def is_right(self, question: str, reply: str) -> bool | None:
        """Whether the reply is labelled right, or else ends in the answer; None where the file has neither."""
        known = _plain(question)
        label = self._labels.get((known, _plain(reply)))
        if label is not None:
            return label
        answers = self._answers.get(known)
        return None if answers is None else is_answer(reply, answers)

    def _add(self, values: dict[str, Any], where: str) -> None:
        shown = shortened(json.dumps(values, ensure_ascii=False))
        question = values.get("question", values.get("prompt"))
        if not isinstance(question, str) or not question.strip():
            raise DataError(f'{where}: no text under "question"; got {shown}; write {_EXAMPLE}')
        known = _plain(question)
        if "answer" in values:
            answers = _answers(values["answer"])
            if answers is None:
                raise DataError(f'{where}: "answer" must be a text, a number or a list of them; got {shown}')
            if self._answers.setdefault(known, answers) != answers:
                raise DataError(f"{where}: an earlier line has another answer to the same question; got {shown}")
            return
        reply, label = values.get("reply"), values.get("label")
        if not isinstance(reply, str) or not isinstance(label, bool | int) or label not in (0, 1):
            raise DataError(f'{where}: neither an "answer" nor a "reply" with a "label" of true or false; got {shown}')
        if self._labels.setdefault((known, _plain(reply)), bool(label)) != bool(label):
            raise DataError(f"{where}: an earlier line has another label for the same reply; got {shown}")


def _plain(text: str) -> str:
    """Texts are the same whatever their white space."""
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
    """Says early that a domain is not installed, without loading its oracle.

    Raises:
        ConfigError: no such domain is installed.
    """
    if domain is not None:
        _installed(domain)


def check_gold(domain: str | None, path: str, questions: Sequence[str] | None) -> None:
    """Refuses gold that could not be asked, before any work.

    Args:
        domain: name of an installed domain.
        path: of a gold file; empty without one.
        questions: test questions of the user's own file; None where the model writes them.

    Raises:
        ConfigError: the domain is not installed, both are given, or the questions are not known before they are written.
        DataError: the file is missing or malformed, or knows none of the test questions.
    """
    check_domain(domain)
    if not path:
        return
    if domain is not None:
        raise ConfigError(
            f'domain = "{domain}" and gold = "{path}" are both given; leave one out (--set domain=none takes a recipe\'s away)'
        )
    if questions is None:
        raise ConfigError(
            f"gold = {path} knows questions by their text, and the model would write new ones; give questions.file, "
            "replies.file or pairs.file as well (a file of questions with answers can be both), or a domain"
        )
    gold = FileGold(Path(path))
    if not any(gold.knows(question) for question in questions):
        raise DataError(
            f"gold file {path} has none of the {len(questions)} test questions of this run, and figures by gold are measured "
            'on them; the texts must be the same, and "split": "test" in a line of the questions puts it there'
        )


def gold_key(path: str) -> str:
    """Hash of the content of a gold file, empty without one.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return file_hash(Path(path)) if path else ""
    except OSError as error:
        raise DataError(f"gold file {path} cannot be read: {error.strerror or error}") from error


def load_gold(domain: str | None, path: str = "") -> Gold | None:
    """The gold oracle: that of a domain, or a file; None without either.

    Raises:
        ConfigError: no such domain is installed; and from `is_right`, an answer that is neither yes, no nor unknown.
        DataError: the file is missing or malformed.
    """
    if path:
        return FileGold(Path(path))
    if domain is None:
        return None
    return _Answers(domain, cast(Gold, _installed(domain).load()()))


class _Answers:
    """A domain whose answers are True, False or None.

    Domains come from other packages. One that answers 1, or numpy's True, is understood. One that answers 0.5 would count as
    right wherever its answer is used as a condition, and is refused.
    """

    def __init__(self, domain: str, gold: Gold) -> None:
        self.name, self._domain, self._gold = gold.name, domain, gold

    def is_right(self, question: str, reply: str) -> bool | None:
        answer: object = self._gold.is_right(question, reply)
        if answer is None:
            return None
        if answer not in (True, False):
            raise ConfigError(
                f'domain "{self._domain}" answers {answer!r}; its is_right should return True, False, or None for a question '
                "that it does not know"
            )
        return bool(answer)
