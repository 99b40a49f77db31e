"""Read the user's seed questions: JSON lines with a `question`, or plain text with one question per line."""

from __future__ import annotations

import json
from pathlib import Path

from selfeval.errors import SeedsError
from selfeval.records import Seed
from selfeval.texts import Line, json_lines, read_text, shortened

__all__ = ["read_seeds"]

_EXAMPLE = '{"question": "..."}'
_LARGEST = 64 << 20
_GIVE = f"pass a file with one question per line (text or {_EXAMPLE})"


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


def _seed(path: str, line: Line) -> Seed:
    number, values = line
    shown = shortened(json.dumps(values, ensure_ascii=False))
    question, reply = values.pop("question", None), values.pop("reply", None)
    if not isinstance(question, str) or not question.strip():
        raise SeedsError(f'{path}, line {number}: missing or empty "question"; got {shown}; write {_EXAMPLE}')
    if reply is not None and not isinstance(reply, str):
        raise SeedsError(f'{path}, line {number}: "reply" must be a string; got {shortened(json.dumps(reply))}')
    return Seed(question.strip(), reply, values)
