"""The user's seed questions: JSON lines with a `question`, or plain text with one question per line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from selfeval.config import RunConfig
from selfeval.errors import SeedsError
from selfeval.grounding import passage_of
from selfeval.records import Seed, Split
from selfeval.runs.conversations import read_messages
from selfeval.stages.given import Given
from selfeval.store import as_storage_error
from selfeval.texts import Line, json_lines, read_text, safe_json, shortened

__all__ = ["append_seed", "asks_seeds", "has_passages", "read_seeds", "replied_seeds", "seeds_of"]

_EXAMPLE = '{"question": "..."}'
_LARGEST = 64 << 20
_JSON = (".jsonl", ".json")
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
        seeds = read_seeds(config.seeds)
        if given is None and any(passage_of(seed.extra) for seed in seeds):
            raise SeedsError(
                f"seeds file {config.seeds} has passages, and generated questions would have none; also set questions.file to "
                "this file, to ask its questions (`selfeval run --seeds` does), or remove the passages"
            )
        return seeds
    if not config.questions.extend:
        return []
    seeds = [Seed(question.opening) for question in given.questions if question.split == Split.TRAIN]
    if not seeds:
        raise SeedsError(
            f"questions.file {config.questions.file} has only test questions, which are never shown as examples, so "
            f"questions.extend has no examples to generate from; {_GIVE} with --seeds, or add training questions"
        )
    return seeds


def asks_seeds(config: RunConfig) -> bool:
    """Return whether the questions of a run are its seeds, as they are if these have passages."""
    return bool(config.seeds) and config.seeds == config.questions.file


def replied_seeds(config: RunConfig, seeds: Sequence[Seed]) -> list[tuple[str, str]]:
    """Return question and reply of the seeds that have one, with which the evaluation compares the policy's replies.

    None if the questions of the run are its seeds: the references of its test questions are compared already, and the others
    are training questions. The reply of a conversation answers its end, while its seed is its opening.
    """
    if asks_seeds(config):
        return []
    return [(s.question, s.reply) for s in seeds if s.reply is not None and s.reply.strip() and "messages" not in s.extra]


def has_passages(path: str) -> bool:
    """Return whether a file of seeds has passages. A file that cannot be read has none here; `read_seeds` says why.

    Raises:
        SeedsError: some lines have a passage, and others have none.
    """
    try:
        seeds = read_seeds(path)
    except SeedsError:
        return False
    without = [seed.question for seed in seeds if not passage_of(seed.extra)]
    if without and len(without) < len(seeds):
        raise SeedsError(
            f"seeds file {path} has {len(seeds) - len(without)} questions with a passage and {len(without)} without one, "
            f'such as "{shortened(without[0])}"; make two files of them: generated questions have no passage. To ask all of '
            "these questions as they are, pass the file as questions.file instead of --seeds"
        )
    return not without


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
    is_json = Path(path).suffix in _JSON or text.lstrip().startswith("{")
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


# -- adding a seed ------------------------------------------------------------------------------------------------------


def append_seed(path: Path, question: str, reply: str | None = None) -> None:
    """Append a seed to a file of JSON lines, and wait until it is on the disk. The file is created if it is not there.

    A file that is not a valid seeds file is not changed, and a line that could not be written completely is removed again.

    Args:
        path: the file.
        question: the question.
        reply: Optional. A reply to it. Default: none.

    Raises:
        SeedsError: the file is not a seeds file of JSON lines.
        StorageError: it cannot be written.
    """
    line = safe_json({"question": question} if reply is None else {"question": question, "reply": reply})
    if path.suffix.lower() not in _JSON:
        raise SeedsError(f"{path} does not end in {' or '.join(_JSON)}; seeds are saved as JSON lines, such as my_seeds.jsonl")
    if path.exists() and path.stat().st_size:
        read_seeds(str(path))
    try:
        with open(path, "ab+", buffering=0) as file:  # a buffer would be written again when the file is closed
            _append_line(file, line.encode())
    except OSError as error:
        raise as_storage_error(path, error) from error


def _append_line(file: FileIO, line: bytes) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    data = (b"" if file.read(1) in (b"", b"\n") else b"\n") + line + b"\n"
    try:
        if (file.write(data) or 0) < len(data):  # the disk became full in the middle
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError:
        # Half a line would make the whole file unreadable.
        with suppress(OSError):
            file.truncate(end)
        raise
