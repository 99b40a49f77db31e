"""Reads the user's seed questions: JSON lines with a `question`, or plain text with one question a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfeval.errors import SeedsError
from selfeval.records import Seed

__all__ = ["read_seeds"]

_EXAMPLE = '{"question": "..."}'


def read_seeds(path: str) -> list[Seed]:
    """The seeds in a file.

    Raises:
        SeedsError: no file was given or it is missing, empty or malformed; the message names the line and what stood there.
    """
    if not path:
        raise SeedsError(f"no seeds were given; use --seeds with a file of questions, one a line (text or {_EXAMPLE})")
    file = Path(path)
    if not file.is_file():
        problem = "is not a file" if file.exists() else "does not exist"
        raise SeedsError(f"seeds file {path} {problem}; give a file of questions, one a line (text or {_EXAMPLE})")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SeedsError(f"seeds file {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    is_json = file.suffix in (".jsonl", ".json") or bool(lines and lines[0][1].startswith("{"))
    seeds = [_json_seed(path, number, line) if is_json else Seed(line) for number, line in lines]
    if not seeds:
        raise SeedsError(f"seeds file {path} has no questions; write at least one, one a line (text or {_EXAMPLE})")
    return seeds


def _json_seed(path: str, number: int, line: str) -> Seed:
    shown = line if len(line) <= 80 else line[:77] + "..."
    try:
        values: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise SeedsError(f"{path}, line {number}: not JSON ({error.msg}); got {shown}; write {_EXAMPLE}, one a line") from error
    if not isinstance(values, dict) or not isinstance(values.get("question"), str) or not values["question"].strip():
        raise SeedsError(f'{path}, line {number}: no text under "question"; got {shown}; write {_EXAMPLE}')
    if any("\ud800" <= character <= "\udfff" for character in values["question"]):
        raise SeedsError(f"{path}, line {number}: half a surrogate pair in the question; got {shown}; write whole characters")
    reply = values.get("reply")
    if reply is not None and not isinstance(reply, str):
        raise SeedsError(f'{path}, line {number}: "reply" must be text; got {json.dumps(reply)}')
    extra = {key: value for key, value in values.items() if key not in ("question", "reply")}
    return Seed(values["question"].strip(), reply, extra)
