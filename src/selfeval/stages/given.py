"""Questions, replies or pairs read from a user's file instead of written and judged by the model.

At most one of `questions.file`, `replies.file` and `pairs.file` is set: a file of replies contains its questions, and a file of
pairs contains both. Files are JSON lines in the run's own format or in common ones; see docs/guides/your-own-data.md. A line
may set `"split": "train"` or `"test"`; the others are split at random, by the run's seed. No question is in both splits, nor
are near-duplicates of each other, nor questions about the same `passage` (`selfeval.grounding`) or near-duplicates of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfeval.config import RunConfig
from selfeval.errors import ConfigError, DataError
from selfeval.execution.tasks import has_tests, task_question
from selfeval.grounding import passage_of, question_with_passage
from selfeval.quality.dedupe import NearDuplicates, normalise
from selfeval.records import Drop, Message, Question, Split
from selfeval.runs.conversations import conversation_text, read_messages
from selfeval.store import file_hash
from selfeval.texts import Line, json_lines, read_text, shortened

__all__ = [
    "FEWEST",
    "Given",
    "Labelled",
    "given_key",
    "has_answers",
    "read_given",
    "read_questions",
    "read_replies",
]

Kind = Literal["questions", "replies", "pairs"]

FEWEST = 4
"""Minimum number of questions for splitting and training."""

_WRITE_THE_REST = ", or set questions.extend = true and let the model write the missing ones"
_LARGEST = 1 << 30
_EXAMPLES: dict[Kind, str] = {
    "questions": '{"question": "..."}',
    "replies": '{"question": "...", "replies": ["...", "..."]}',
    "pairs": '{"prompt": "...", "chosen": "...", "rejected": "..."}',
}
_QUESTION, _REPLY = ("question", "prompt"), ("reply", "response", "completion")


@dataclass(frozen=True)
class Labelled:
    """A pair of replies with the user's preference and its confidence."""

    chosen: str
    rejected: str
    confidence: float


@dataclass
class _Row:
    """All data of the file about one question.

    Attributes:
        text: the question as the model reads it.
        asked: the question alone, without a passage.
        passage: passage that the question is grounded in; empty without one.
        references: replies that the user considers good: the `reply` of a question, the chosen replies of pairs.
    """

    text: str
    line: int
    split: Split | None
    messages: tuple[Message, ...] = ()
    asked: str = ""
    passage: str = ""
    replies: list[str] = field(default_factory=list)
    pairs: list[Labelled] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def add_reply(self, text: str, form: str) -> None:
        """Add a reply unless one of the same form is already present."""
        if form not in self._known:
            self._known.add(form)
            self.replies.append(text)

    def add_references(self, texts: Sequence[str]) -> None:
        """Add the references that are not yet present."""
        self.references = [*dict.fromkeys([*self.references, *texts])]


@dataclass(frozen=True)
class Given:
    """The content of the file.

    Attributes:
        kind: kind of the file.
        questions: questions with their splits.
        dropped: questions that are not used.
        replies: distinct replies by question id.
        pairs: pairs by question id.
        references: good replies by question id, with which only the evaluation compares those of the policy.
    """

    kind: Kind
    questions: tuple[Question, ...]
    dropped: tuple[Drop, ...]
    replies: dict[str, tuple[str, ...]]
    pairs: dict[str, tuple[Labelled, ...]]
    references: dict[str, tuple[str, ...]] = field(default_factory=dict)


def given_key(config: RunConfig) -> list[str]:
    """Return the identity of the file: its kind and a hash of its content; empty if there is no file.

    Raises:
        ConfigError, DataError: see `read_given`.
    """
    found = _chosen(config)
    if found is None:
        return []
    kind, path = found
    try:
        # The hash in place of the path: a moved or renamed file gives the same run.
        return [kind, file_hash(path)]
    except OSError as error:
        raise DataError(f"{kind}.file {path} cannot be read: {error.strerror or error}") from error


def _chosen(config: RunConfig) -> tuple[Kind, Path] | None:
    files: dict[Kind, str] = {
        "questions": config.questions.file,
        "replies": config.replies.file,
        "pairs": config.pairs.file,
    }
    given: list[Kind] = [kind for kind in files if files[kind]]
    if config.questions.extend and given != ["questions"]:
        raise ConfigError(
            "questions.extend = true adds generated questions to those of questions.file, which is the only file that may be "
            f"set; {' and '.join(f'{kind}.file' for kind in given) or 'no file'} is set"
        )
    if len(given) > 1:
        named = " and ".join(f"{kind}.file" for kind in given)
        raise ConfigError(
            f"{named} are set; set only one: a file of replies includes its questions, and a file of pairs includes both"
        )
    if not given:
        return None
    if given[0] != "questions" and config.rounds > 1:
        raise ConfigError(
            f"{given[0]}.file is set and rounds = {config.rounds}, but later rounds learn from replies of the previous round's "
            "policy, which no file can provide; set rounds = 1, or use questions.file"
        )
    return given[0], Path(files[given[0]])


def read_given(config: RunConfig) -> Given | None:
    """Read the questions, replies or pairs of the configured file; None if no file is configured.

    Raises:
        ConfigError: several files are configured, or one that later rounds cannot use.
        DataError: the file is missing or malformed, or has too few questions; the message names the line.
    """
    found = _chosen(config)
    if found is None:
        return None
    kind, path = found
    rows = _rows(kind, path)
    passages = _Passages(rows, config.questions.near_duplicate)
    _check_passages(rows, passages, path, config)
    rows, dropped = _split(rows, passages, config)
    questions = tuple(
        Question(f"q{number:06d}", row.text, row.split or Split.TRAIN, "file", row.messages) for number, row in enumerate(rows)
    )
    if not config.questions.extend:
        _check_enough(kind, path, questions, rows, passages)
    ids = [question.id for question in questions]
    return Given(
        kind,
        questions,
        tuple(dropped),
        {i: tuple(row.replies) for i, row in zip(ids, rows, strict=True) if row.replies},
        {i: tuple(row.pairs) for i, row in zip(ids, rows, strict=True) if row.pairs},
        {i: tuple(row.references) for i, row in zip(ids, rows, strict=True) if row.references},
    )


def _check_passages(rows: Sequence[_Row], passages: _Passages, path: Path, config: RunConfig) -> None:
    """Refuse a passage in both splits, and passages where further questions are generated, which would have none."""
    first: dict[tuple[str, Split], _Row] = {}
    for row in rows:
        if row.passage and config.questions.extend:
            raise ConfigError(
                f"questions.extend = true adds generated questions, which have no passage, to those of {path}, of which line "
                f"{row.line} has one; set questions.extend=false, or write more questions with `selfeval seeds`"
            )
        if not row.passage or row.split is None:
            continue
        group = passages.group(row)
        first.setdefault((group, row.split), row)
        other = first.get((group, Split.TRAIN if row.split == Split.TEST else Split.TEST))
        if other is not None:
            same = "the same passage" if passages.form(other) == passages.form(row) else "a near-duplicate of its passage"
            raise DataError(
                f'{path}, line {row.line}: "split" is {row.split}, but line {other.line} has {same} in the other split; a '
                "passage and its near-duplicates must be in one split"
            )


def has_answers(path: Path) -> bool:
    """Return whether a line of a file of questions has an `answer` or unit tests.

    Raises:
        DataError: the file is missing or malformed; the message names the line.
    """
    text = _read("questions", path)
    # Most files have neither, and are not parsed a second time.
    if '"answer"' not in text and '"test' not in text:
        return False
    return any(values.get("answer") not in (None, "") or has_tests(values) for _, values in _lines("questions", path, text))


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions whose splits need not be drawn: lines of the training split are left out.

    Raises:
        DataError: the file is missing, empty or malformed; the message names the line.
    """
    return [_test_question(row) for row in _rows("questions", path) if row.split != Split.TRAIN]


def read_replies(path: Path) -> list[tuple[Question, str]]:
    """Read a file with one reply to each question.

    Raises:
        DataError: the file is missing, empty or malformed, or has several different replies to a question.
    """
    rows = _rows("replies", path)
    for row in rows:
        if len(row.replies) > 1:
            raise DataError(
                f"{path} has {len(row.replies)} different replies to the question of line {row.line}; a comparison needs one"
            )
    return [(_test_question(row), row.replies[0]) for row in rows]


def _test_question(row: _Row) -> Question:
    return Question("", row.text, Split.TEST, "file", row.messages)


def _check_enough(kind: Kind, path: Path, questions: Sequence[Question], rows: Sequence[_Row], passages: _Passages) -> None:
    train = sum(question.split == Split.TRAIN for question in questions)
    test = len(questions) - train
    if train < FEWEST or not test:
        # Few passages leave few ways to split many questions, which their number does not show.
        about = (
            f"They are about {passages.count} passage{'s' * (passages.count > 1)}, counting near-duplicates once, and all "
            "questions about a passage get the same split. "
        )
        raise DataError(
            f"{kind}.file {path} has {train} training and {test} test questions; at least {FEWEST} and 1 are needed. "
            f"{about if passages.count else ''}"
            f'Add lines{" about other passages" if passages.count else ""}, or correct their "split"'
            + (_WRITE_THE_REST if kind == "questions" and not passages.count else "")
        )
    if kind == "replies" and not any(len(row.replies) > 1 for row in rows if row.split == Split.TRAIN):
        raise DataError(
            f"replies.file {path} has no training question with two different replies, so there is nothing to judge"
        )


# -- lines --------------------------------------------------------------------------------------------------------------


def _rows(kind: Kind, path: Path) -> list[_Row]:
    """Return the questions in order of their first lines, each with the data of all its lines."""
    rows: dict[str, _Row] = {}
    for line in _lines(kind, path, _read(kind, path)):
        _add(rows, kind, path, line)
    if not rows:
        raise DataError(f"{kind}.file {path} is empty; write one {_EXAMPLES[kind]} per line")
    return list(rows.values())


def _read(kind: Kind, path: Path) -> str:
    return read_text(path, f"{kind}.file", DataError, most=_LARGEST, remedy=f"use JSON lines ({_EXAMPLES[kind]})")


def _lines(kind: Kind, path: Path, text: str) -> Iterator[Line]:
    """Yield the lines. A file of questions may be plain text, one question per line."""
    if path.suffix.lower() in (".csv", ".tsv"):
        raise DataError(f"{kind}.file {path} is a table, which is not supported; use JSON lines such as {_EXAMPLES[kind]}")
    is_json = path.suffix in (".jsonl", ".json") or text.lstrip().startswith("{")
    if kind != "questions" or is_json:
        yield from json_lines(text, str(path), DataError, _EXAMPLES[kind])
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, {"question": line.strip()}


def _add(rows: dict[str, _Row], kind: Kind, path: Path, line: Line) -> None:
    number, values = line
    reader = _Reader(values, f"{path}, line {number}", _EXAMPLES[kind])
    asked, split = reader.question(), reader.split()
    question = conversation_text(asked)
    # Several lines may be about one question, such as one reply or one pair per line.
    row = rows.setdefault(question, reader.row(question, number, split, asked if len(asked) > 1 else ()))
    if split is not None and row.split not in (None, split):
        raise DataError(
            f'{path}, line {number}: "split" is {split}, but line {row.line} has the same question with {row.split}; '
            "a question must be in one split"
        )
    row.split = row.split or split
    if kind == "questions":
        row.add_references(reader.references())
    if kind == "replies":
        for reply in reader.replies():
            # Replies are drawn in pairs later, and two that differ only in case, punctuation or spaces are no comparison.
            row.add_reply(reply, normalise(reply))
    if kind == "pairs":
        pair = reader.pair()
        row.pairs.append(pair)
        row.add_references([pair.chosen])
        for reply in (pair.chosen, pair.rejected):
            # Looked up by their exact text when the pairs are made (stages/verdicts.py).
            row.add_reply(reply, reply)


@dataclass(frozen=True)
class _Reader:
    """Reads the fields of one line. Messages name the line and show its beginning."""

    values: dict[str, Any]
    where: str
    example: str

    def question(self) -> tuple[Message, ...]:
        """Return the turns of the question: a text, or a conversation; for pairs, optionally the start of `chosen`."""
        if text := task_question(self.values) or question_with_passage(self.values):
            return (Message("user", text),)
        if self.values.get("passage") is not None:
            raise self._wrong('"passage" must be a text, and its "question" too')
        name = next((name for name in (*_QUESTION, "messages") if name in self.values), None)
        if name is None and isinstance(self.values.get("chosen"), list):
            return self._turns("chosen", self.values["chosen"][:-1])
        if name is None:
            raise self._wrong(f'missing or empty "{_QUESTION[0]}"')
        found = self.values[name]
        is_conversation = name == "messages" or isinstance(found, list)
        return self._turns(name, found) if is_conversation else (Message("user", self._text(name, found, "user")),)

    def row(self, text: str, line: int, split: Split | None, messages: tuple[Message, ...]) -> _Row:
        """Return a new row for a question."""
        passage = passage_of(self.values) or ""
        asked = str(self.values.get("question", self.values.get("prompt"))).strip() if passage else text
        return _Row(text, line, split, messages, asked, passage)

    def _turns(self, name: str, value: Any) -> tuple[Message, ...]:
        try:
            return read_messages(value)
        except ValueError as error:
            raise self._wrong(f'"{name}" {error}') from None

    def replies(self) -> list[str]:
        if "replies" not in self.values:
            return [self._text(name, self.values[name], "assistant") for name in [self._named(_REPLY)]]
        found = self.values["replies"]
        if not isinstance(found, list) or not found:
            raise self._wrong('"replies" must be a list of strings')
        return [self._text("replies", reply, "assistant") for reply in found]

    def references(self) -> list[str]:
        """Return the replies in a line of a file of questions, where they are optional: one, or a list."""
        found = self.values.get("reply")
        values = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(value, str) for value in values):
            raise self._wrong('"reply" must be a text or a list of texts: references, with which replies are compared')
        return [value.strip() for value in values if value.strip()]

    def pair(self) -> Labelled:
        chosen, rejected = (self._reply_of_pair(name) for name in ("chosen", "rejected"))
        if normalise(chosen) == normalise(rejected):
            raise self._wrong('"chosen" and "rejected" are identical')
        confidence = self.values.get("confidence", 1.0)
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0.5 <= confidence <= 1.0:
            raise self._wrong(f'"confidence" must be a number from 0.5 to 1, got {shortened(json.dumps(confidence))}')
        return Labelled(chosen, rejected, float(confidence))

    def split(self) -> Split | None:
        found = self.values.get("split")
        if found is None:
            return None
        if found not in ("train", "test"):
            raise self._wrong(f'"split" must be "train" or "test", got {shortened(json.dumps(found))}')
        return Split(found)

    def _reply_of_pair(self, name: str) -> str:
        found = self.values.get(name)
        return self._text(name, found[-1:] if isinstance(found, list) else found, "assistant")

    def _named(self, names: Sequence[str]) -> str:
        found = next((name for name in names if name in self.values), None)
        if found is None:
            raise self._wrong(f'missing or empty "{names[0]}"')
        return found

    def _text(self, name: str, value: Any, role: str) -> str:
        """Return a text, or the content of the single message of a dialogue."""
        if isinstance(value, list):
            if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
                raise self._wrong(f'"{name}" must be a single message of the {role}')
            value = value[0].get("content")
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(f'missing or empty "{name}"')
        return value.strip()

    def _wrong(self, problem: str) -> DataError:
        shown = shortened(json.dumps(self.values, ensure_ascii=False))
        return DataError(f"{self.where}: {problem}; got {shown}; write {self.example}")


# -- splits -------------------------------------------------------------------------------------------------------------


def _split(rows: list[_Row], passages: _Passages, config: RunConfig) -> tuple[list[_Row], list[Drop]]:
    """Assign a split to every question, and keep near-duplicates out of the other split.

    If the file has only questions, a near-duplicate of an earlier one is dropped. Questions with replies or pairs are kept, and
    near-duplicates of each other, direct or through a third question, get the same split. One is dropped only if it connects
    questions whose lines request different splits; it is always a training question or one that requests no split. Questions
    about the same passage, or near-duplicates of it, get the same split.
    """
    ordered = sorted(rows, key=lambda row: row.split != Split.TEST)  # questions whose lines request the test split come first
    index, groups, dropped = _Twins(config.questions.near_duplicate, passages), _Groups(), []
    for row in ordered:
        twins = index.find_all(row)
        # Questions alone cost nothing to drop; those with replies or pairs are the user's data, dropped only in a conflict.
        if twins and (not row.replies or len(groups.asked(twins) | ({row.split} if row.split else set())) > 1):
            dropped.append(Drop("questions", "near_duplicate", row.text, {"of": twins[0]}))
            continue
        groups.add(row, [*twins, *index.of_passage(row)])
        index.add(row)
    firsts = groups.firsts
    _draw_splits([row for row in firsts if row.split is None], firsts, config)
    groups.share_splits()
    # In the order of the file: the order above only served to decide.
    return [row for row in rows if row.text in groups.rows], dropped


class _Passages:
    """The passages of the questions, in groups of near-duplicates, direct or through other passages.

    Two files with the same text, such as a page and its PDF, differ in line breaks and marks; two versions of a document differ
    in a few words or numbers. As exact texts they would be separate passages, one for training and one for the test.
    """

    def __init__(self, rows: Sequence[_Row], threshold: float) -> None:
        self._form: dict[str, str] = {}
        self._first: dict[str, str] = {}
        index = NearDuplicates(threshold, same_numbers=False)
        for passage in dict.fromkeys(row.passage for row in rows if row.passage):
            self._form[passage] = normalise(passage) or passage
            firsts = [*dict.fromkeys(self._first[twin] for twin in index.find_all(passage)), passage]
            if len(firsts) > 2:  # it connects groups
                self._first = {text: firsts[0] if old in firsts else old for text, old in self._first.items()}
            self._first[passage] = firsts[0]
            index.add(passage, passage)

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(set(self._first.values()))

    def form(self, row: _Row) -> str:
        """Return the passage of a question without the differences of form; empty without a passage."""
        return self._form.get(row.passage, "")

    def group(self, row: _Row) -> str:
        """Return the first passage of the group; empty without a passage."""
        return self._first.get(row.passage, "")


class _Twins:
    """Finds near-duplicates of a question among those about the same passage, or without one.

    A passage would hide the difference between two questions about it, and the same question about two passages asks for two
    answers.
    """

    def __init__(self, threshold: float, passages: _Passages) -> None:
        self._threshold, self._passages = threshold, passages
        self._by_passage: dict[str, NearDuplicates] = {}
        self._first: dict[str, str] = {}

    def find_all(self, row: _Row) -> list[str]:
        index = self._by_passage.get(self._passages.form(row))
        return index.find_all(row.asked) if index else []

    def add(self, row: _Row) -> None:
        index = self._by_passage.setdefault(self._passages.form(row), NearDuplicates(self._threshold))
        index.add(row.text, row.asked)
        if row.passage:
            self._first.setdefault(self._passages.group(row), row.text)

    def of_passage(self, row: _Row) -> list[str]:
        """Return the first question about the same passage or a near-duplicate of it, if there is one."""
        first = self._first.get(self._passages.group(row)) if row.passage else None
        return [] if first is None else [first]


class _Groups:
    """Groups of near-duplicates, direct or through other questions. The first question of a group has the group's split."""

    def __init__(self) -> None:
        self.rows: dict[str, _Row] = {}
        self._first: dict[str, str] = {}
        self._number: dict[str, int] = {}

    def add(self, row: _Row, twins: Sequence[str]) -> None:
        """Add a question, merging the groups of its near-duplicates, and of its passage, into one group with it."""
        # The earliest question leads the merged group, so the result does not depend on the order of a set.
        firsts = sorted({self._first[twin] for twin in twins}, key=self._number.__getitem__)
        first = firsts[0] if firsts else row.text
        self.rows[row.text], self._number[row.text], self._first[row.text] = row, len(self._number), first
        asked = [split for text in (*firsts, row.text) if (split := self.rows[text].split)]
        self.rows[first].split = asked[0] if asked else None
        if len(firsts) > 1:
            self._first = {text: first if old in firsts else old for text, old in self._first.items()}

    def asked(self, texts: Sequence[str]) -> set[Split]:
        """Return the splits requested for the groups of these questions."""
        return {split for text in texts if (split := self.rows[self._first[text]].split)}

    @property
    def firsts(self) -> list[_Row]:
        """Return the first question of each group."""
        return [self.rows[text] for text in dict.fromkeys(self._first.values())]

    def share_splits(self) -> None:
        """Give every question the split of the first question of its group."""
        for text, first in self._first.items():
            self.rows[text].split = self.rows[first].split


def _draw_splits(undecided: list[_Row], all_rows: list[_Row], config: RunConfig) -> None:
    """Draw test questions in the proportion of questions.test to questions.train, using only the run's seed and the texts."""
    share = config.questions.test / (config.questions.train + config.questions.test)
    asked = sum(row.split == Split.TEST for row in all_rows)
    # At least one test question, unless the lines themselves request some or more are generated.
    fewest = 0 if config.questions.extend else 1
    wanted = max(0, max(fewest, round(share * len(all_rows))) - asked)

    def drawn(row: _Row) -> bytes:
        # Sorting by a hash is a shuffle that depends on the seed and the texts, not on the order of the lines.
        return hashlib.sha256(f"{config.seed}/split/{row.text}".encode()).digest()

    for number, row in enumerate(sorted(undecided, key=drawn)):
        row.split = Split.TEST if number < wanted else Split.TRAIN
