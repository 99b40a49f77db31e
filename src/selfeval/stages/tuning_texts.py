"""Plain text to fine-tune on: files of documents, concatenated and cut into rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from selfeval.config import RunConfig, TuningConfig
from selfeval.errors import ConfigError, TextError
from selfeval.stages.context import Context
from selfeval.stages.tuning_rows import TuningRows, row_length
from selfeval.stages.tuning_split import TextSplit, split_texts
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
            TextError: see `read_texts`; or there is too little text to hold some out.
        """
        default, read = TuningConfig(), {"held_out"} if config.tuning.extend_vocabulary else set()
        changed = (name for name in _OF_CONVERSATIONS if getattr(config.tuning, name) != getattr(default, name))
        if unread := [name for name in changed if name not in read]:
            names = ", ".join(f"tuning.{name}" for name in unread)
            raise ConfigError(f"tuning on plain text does not use {names}; remove it, or tune on conversations (--chat FILE)")
        self._split(config)

    def _split(self, config: RunConfig) -> TextSplit:
        """Return the text to train on and the held-out text, which only a tuning with new tokens has."""
        key = (bool(config.tuning.extend_vocabulary), config.tuning.held_out, config.seed)
        if key not in self._splits:
            self._splits[key] = self._split_anew(config)
        return self._splits[key]

    @cached_property
    def _splits(self) -> dict[tuple[bool, float, int], TextSplit]:
        # Comparing all documents takes longer than reading them.
        return {}

    def _split_anew(self, config: RunConfig) -> TextSplit:
        if not config.tuning.extend_vocabulary or not config.tuning.held_out:
            return TextSplit(self._documents, [], "documents")
        found = split_texts(self._documents, config.tuning.held_out, f"{config.seed}/held out")
        if not found.held and found.refused:
            raise TextError(
                f"no document can be held out: those that were drawn and their near-copies have {found.refused:,} of the "
                f"{sum(map(len, self._documents)):,} characters; add documents that are no copies, or set tuning.held_out=0, "
                "which leaves the effect of the new tokens unmeasured"
            )
        if not found.held or not found.train:
            copies = f" ({found.left_out:,} characters of it are copies of the rest)" if found.left_out else ""
            raise TextError(
                f"the text of {sum(map(len, self._documents)):,} characters is too short to hold out "
                f"{config.tuning.held_out:.0%} of it, at a space or a line break{copies}; add text, or set tuning.held_out=0, "
                "which leaves the effect of the new tokens unmeasured"
            )
        return found

    def texts(self, config: RunConfig) -> list[str]:
        """Return the text to train on."""
        return self._split(config).train

    def rows(self, context: Context, length: int | None) -> TuningRows:
        """Pack the documents into rows of tokens; the remainder is dropped."""
        loaded = context.backbone.loaded
        row = row_length(loaded, length)
        with context.terminal.waiting("reading the text"):
            split = self._split(context.config)
            encoded = [_encode(loaded.tokenizer, document) for document in split.train]
            passages = [
                whole_text(ids, held.cluster) for held in split.held for ids in _passages(loaded.tokenizer, held.text, row)
            ]
        rows = pack(encoded, row)
        tokens = sum(map(len, encoded))
        if not rows:
            raise TextError(f"the text has {tokens:,} tokens, fewer than one row of {row:,}; add text, or lower --length")
        steps = context.config.tuning
        context.terminal.note(
            f"{len(rows):,} rows of {row:,} tokens, {tokens - len(rows) * row:,} tokens left over; "
            f"{steps.steps * steps.batch / len(rows):.2g} epochs"
        )
        if split.left_out:
            context.terminal.note(
                f"{split.left_out:,} characters of the held-out ends have a near-copy in the text to train on and are left out"
            )
        facts = {"documents": len(split.train), "held_out": len(passages)} if passages else {}
        held = [(passage,) for passage in passages]
        return TuningRows("text", row, [(whole_text(ids),) for ids in rows], held, facts, split.clusters)


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


def _passages(tokenizer: Any, text: str, length: int) -> Iterator[list[int]]:
    """Yield the text as passages of at most half of `length` tokens, which leaves room for the same text in old tokens.

    A passage is halved at a space or line break until it is short enough, so its text hardly depends on the tokenizer.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [*([] if start is None else [int(start)]), *map(int, tokenizer.encode(text, add_special_tokens=False))]
    if len(ids) <= max(2, length // 2) or len(text) < 2:
        if len(ids) > 1:
            yield ids
        return
    middle = len(text) // 2
    cut = next((cut + 1 for sign in "\n 。" if (cut := text.find(sign, middle, middle + middle // 2)) >= 0), middle)
    yield from _passages(tokenizer, text[:cut], length)
    yield from _passages(tokenizer, text[cut:], length)


def _encode(tokenizer: Any, document: str) -> list[int]:
    """Encode a document with the tokenizer's start tokens and an end token, which separate it from its neighbours."""
    ids = [int(i) for i in tokenizer.encode(document)]
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, int(end)]
