"""Read the user's seed questions: JSON lines with a `question`, or plain text with one question per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfeval.config import RunConfig
from selfeval.errors import SeedsError
from selfeval.records import Seed, Split
from selfeval.runs.conversations import read_messages
from selfeval.stages.given import Given
from selfeval.texts import Line, json_lines, read_text, shortened

__all__ = ["read_seeds", "seeds_of"]

_EXAMPLE = '{"question": "..."}'
_LARGEST = 64 << 20
_GIVE = f"pass a file with one question per line (text or {_EXAMPLE})"


def seeds_of(config: RunConfig, given: Given | None) -> list[Seed]:
    """Return the seeds of a run: those of the seeds file, or, if a file of questions is extended, its training questions.

    Args:
        config: configuration of the run.
        given: content of the user's file of questions, replies or pairs; None without one. With such a file seeds are optional.

    Raises:
        SeedsError: there are no seeds, and questions have to be generated; or the seeds file is unusable.
    """
    if config.seeds or given is None:
        return read_seeds(config.seeds)
    if not config.questions.extend:
        return []
    seeds = [Seed(question.opening) for question in given.questions if question.split == Split.TRAIN]
    if not seeds:
        raise SeedsError(
            f"questions.file {config.questions.file} has only test questions, which are never shown as examples, so "
            f"questions.extend has no examples to generate from; {_GIVE} with --seeds, or add training questions"
        )
    return seeds


def read_seeds(path: str) -> list[Seed]:
    """Read the seeds from a file.

    Raises:
        SeedsError: no file was given, or it is missing, empty or malformed; the message quotes the line.
    """
    if not path:
        raise SeedsError(f"no seeds were given; pass --seeds with a file of one question per line (text or {_EXAMPLE})")
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        raise SeedsError(f"seeds file {path} is a table, which is not supported; {_GIVE}")
    text = read_text(Path(path), "seeds file", SeedsError, most=_LARGEST, remedy=_GIVE)
    # JSON lines in a file named .txt would otherwise become questions, braces included.
    is_json = Path(path).suffix in (".jsonl", ".json") or text.lstrip().startswith("{")
    if is_json:
        seeds = [_seed(path, line) for line in json_lines(text, path, SeedsError, _EXAMPLE)]
    else:
        seeds = [Seed(line.strip()) for line in text.split("\n") if line.strip()]
    if not seeds:
        raise SeedsError(f"seeds file {path} has no questions; write at least one, one per line (text or {_EXAMPLE})")
    return seeds


def _opening(messages: Any, where: str, shown: str) -> str:
    """Return the first user turn of a conversation: new questions are single turns, so their examples are too."""
    try:
        return next(message.content for message in read_messages(messages) if message.role == "user")
    except ValueError as error:
        raise SeedsError(f'{where}: "messages" {error}; got {shown}; write {_EXAMPLE}') from None


def _seed(path: str, line: Line) -> Seed:
    number, values = line
    shown = shortened(json.dumps(values, ensure_ascii=False))
    question, reply = values.pop("question", None), values.pop("reply", None)
    if question is None and "messages" in values:
        question = _opening(values["messages"], f"{path}, line {number}", shown)
    if not isinstance(question, str) or not question.strip():
        raise SeedsError(f'{path}, line {number}: missing or empty "question"; got {shown}; write {_EXAMPLE}')
    if reply is not None and not isinstance(reply, str):
        raise SeedsError(f'{path}, line {number}: "reply" must be a string; got {shortened(json.dumps(reply))}')
    return Seed(question.strip(), reply, values)
