"""Plain text to fine-tune on: files of documents, concatenated and cut into rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from selfeval.config import RunConfig, TuningConfig
from selfeval.errors import ConfigError, TextError
from selfeval.stages.context import Context
from selfeval.stages.tuning_rows import TuningRows, row_length
from selfeval.texts import Line, json_lines, read_text, shortened
from selfeval.training.documents import whole_text
from selfeval.training.sft import pack

__all__ = ["LARGEST", "TextFiles", "read_texts"]

_EXAMPLE = '{"text": "..."}'
_OF_CONVERSATIONS = ("packing", "too_long", "held_out")
LARGEST = 1 << 30
"""Maximum size of a file in bytes; its whole text is held in memory, as characters and as tokens."""


@dataclass(frozen=True)
class TextFiles:
    """Files of plain text; see `read_texts`."""

    paths: Sequence[Path]
    also_read: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def _documents(self) -> list[str]:
        return read_texts(self.paths)

    def check(self, config: RunConfig) -> None:
        """Check the settings and read the files, before anything is written or loaded.

        Raises:
            ConfigError: a setting is about conversations.
            TextError: see `read_texts`.
        """
        default = TuningConfig()
        if unread := [name for name in _OF_CONVERSATIONS if getattr(config.tuning, name) != getattr(default, name)]:
            names = ", ".join(f"tuning.{name}" for name in unread)
            raise ConfigError(f"tuning on plain text does not use {names}; remove it, or tune on conversations (--chat FILE)")
        _ = self._documents

    def rows(self, context: Context, length: int | None) -> TuningRows:
        """Pack the documents into rows of tokens; the remainder is dropped."""
        loaded = context.backbone.loaded
        row = row_length(loaded, length)
        with context.terminal.waiting("reading the text"):
            encoded = [_encode(loaded.tokenizer, document) for document in self._documents]
        rows = pack(encoded, row)
        tokens = sum(map(len, encoded))
        if not rows:
            raise TextError(f"the text has {tokens:,} tokens, fewer than one row of {row:,}; add text, or lower --length")
        steps = context.config.tuning
        context.terminal.note(
            f"{len(rows):,} rows of {row:,} tokens, {tokens - len(rows) * row:,} tokens left over; "
            f"{steps.steps * steps.batch / len(rows):.2g} epochs"
        )
        return TuningRows("text", row, [(whole_text(ids),) for ids in rows])


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read the documents in files: each line's `text` in `.jsonl` and `.json` files, the whole content of any other file.

    Raises:
        TextError: a file is missing, empty, not UTF-8, or has a line without a `text`; the message quotes the line.
    """
    return [document for path in paths for document in _read_text(path)]


def _read_text(path: Path) -> list[str]:
    text = read_text(path, "text", TextError, most=LARGEST, remedy=f"use plain text, or JSON lines ({_EXAMPLE}) named .jsonl")
    documents = [text]
    if path.suffix in (".jsonl", ".json"):
        documents = [_document(path, line) for line in json_lines(text, str(path), TextError, _EXAMPLE)]
    found = [document for document in documents if document.strip()]
    if not found:
        raise TextError(f"text {path} is empty; use plain text, or JSON lines ({_EXAMPLE})")
    return found


def _document(path: Path, line: Line) -> str:
    number, values = line
    text = values.get("text")
    if not isinstance(text, str):
        shown = shortened(json.dumps(values, ensure_ascii=False))
        hint = "; conversations are read with --chat" if {"messages", "completion"} & values.keys() else ""
        raise TextError(f'{path}, line {number}: missing or empty "text"; got {shown}; write one {_EXAMPLE} per line{hint}')
    return text


def _encode(tokenizer: Any, document: str) -> list[int]:
    """Encode a document with the tokenizer's start tokens and an end token, which separate it from its neighbours."""
    ids = [int(i) for i in tokenizer.encode(document)]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]
