"""Rows to fine-tune on, and the interface of the sources that they come from."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from selfeval.backbone.load import LoadedModel
from selfeval.backbone.packing import reads_packed_rows
from selfeval.config import RunConfig
from selfeval.errors import TextError
from selfeval.stages.context import Context
from selfeval.training.documents import Document, Row, fit_documents, hold_out, pack_documents

__all__ = ["Source", "TuningRows", "conversation_rows", "row_length"]

_ROW = 2048
"""Default tokens of a row of conversations, if the longest conversation is not longer."""


@dataclass(frozen=True)
class TuningRows:
    """Rows of documents.

    Attributes:
        kind: `text`, `conversations` or `preferred replies`.
        length: maximum tokens of a row.
        rows: rows to train on.
        held_out: rows whose loss is only measured.
        facts: further facts for the exported folder.
        clusters: name of the clusters of the held-out documents.
    """

    kind: str
    length: int
    rows: Sequence[Row]
    held_out: Sequence[Row] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    clusters: str = "conversations"

    @property
    def digest(self) -> str:
        """Hash of all tokens, their masks and their rows."""
        found = hashlib.sha256(str((self.length, len(self.rows), len(self.held_out))).encode())
        for row in (*self.rows, *self.held_out):
            for document in row:
                # The lengths separate documents and rows; the ids alone would not show where one ends.
                found.update(array("q", (len(row), len(document), *document.ids)).tobytes())
                found.update(bytes(document.trained))
        return found.hexdigest()[:16]


class Source(Protocol):
    """The origin of the rows: files of text, files of conversations, or a run."""

    @property
    def also_read(self) -> Collection[str]:
        """Sections of the configuration that it reads, besides those that every tuning uses."""
        ...

    def check(self, config: RunConfig) -> None:
        """Refuse input that cannot be used, before a folder is created or a weight is read.

        Raises:
            InputError: a setting or a file cannot be used.
        """
        ...

    def texts(self, config: RunConfig) -> Sequence[str]:
        """Return the text that new tokens are learnt from, without the held-out part."""
        ...

    def rows(self, context: Context, length: int | None) -> TuningRows:
        """Return the rows, and print how many there are.

        Args:
            context: configuration, backbone and templates.
            length: Optional. Tokens per row.
        """
        ...


def row_length(loaded: LoadedModel, wanted: int | None) -> int:
    """Return the tokens per row: the given ones, or else the model's context.

    Raises:
        TextError: they exceed the context, or neither is known.
    """
    context = loaded.context_length
    if wanted is None and context is None:
        raise TextError("this model's config has no context length; set the tokens per row with --length")
    if wanted is not None and context is not None and wanted > context:
        raise TextError(
            f"--length {wanted:,} is more than this model's context of {context:,} tokens; lower it, or extend the context: "
            "--set backbone.context.rope_scaling=yarn --set backbone.context.rope_factor=N"
        )
    return wanted or context or 0


def conversation_rows(
    context: Context, kind: str, documents: Sequence[Document], length: int | None, held: Collection[int] | None = None
) -> TuningRows:
    """Fit documents into rows, hold some out, and pack them.

    Args:
        context: configuration and backbone.
        kind: name of the documents.
        documents: the documents.
        length: Optional. Tokens per row.
        held: Optional. Indices of the held-out documents. Default: `tuning.held_out` of those that fit.

    Raises:
        TextError: no document is left, or the length exceeds the model's context.
    """
    config, loaded = context.config, context.backbone.loaded
    longest = max(map(len, documents))
    wanted = length if length is not None else min(max(_ROW, longest), loaded.context_length or max(_ROW, longest))
    row = row_length(loaded, wanted)
    fitting, changed = fit_documents(documents, row, cut=config.tuning.too_long == "cut")
    if not fitting:
        raise TextError(
            f"none of the {len(documents):,} conversations fits a row of {row:,} tokens (the longest has {longest:,}); raise "
            "--length, or set tuning.too_long=cut"
        )
    if held is None:
        train, tested = hold_out(fitting, config.tuning.held_out, f"{config.seed}/held out")
    else:
        parts = [[d for i, d in enumerate(documents) if (i in held) == is_held] for is_held in (False, True)]
        train, tested = (fit_documents(part, row, cut=config.tuning.too_long == "cut")[0] for part in parts)
        if not train:
            raise TextError(
                f"none of the {len(parts[0]):,} conversations to train on fits a row of {row:,} tokens; raise --length"
            )
    too_long = {"too_long": changed, "too_long_are": _TOO_LONG[config.tuning.too_long]}
    found = TuningRows(
        kind,
        row,
        _in_rows(train, row, config.tuning.packing),
        _in_rows(tested, row, config.tuning.packing),
        {"documents": len(train), "held_out": len(tested), **too_long},
    )
    context.terminal.note(_sentence(found, context))
    if any(len(row) > 1 for row in found.rows) and not reads_packed_rows(context.backbone):
        context.terminal.note(
            f"models of type {context.backbone.model.config.model_type} cannot separate conversations that share a row, so "
            "each is read in a separate row: the loss is the same, with more padding"
        )
    return found


def _in_rows(documents: Sequence[Document], length: int, packing: bool) -> list[Row]:
    return pack_documents(documents, length) if packing else [(document,) for document in documents]


_TOO_LONG = {"drop": "dropped", "cut": "cut"}


def _sentence(found: TuningRows, context: Context) -> str:
    steps, facts = context.config.tuning, found.facts
    packed = f" in {len(found.rows):,} rows of up to {found.length:,} tokens" if steps.packing else ""
    held = f", {facts['held_out']:,} held out" if facts["held_out"] else ", none held out"
    too_long = f", {facts['too_long']:,} too long ({facts['too_long_are']})" if facts["too_long"] else ""
    return (
        f"{facts['documents']:,} {found.kind}{packed}{held}{too_long}; {steps.steps * steps.batch / len(found.rows):.2g} epochs"
    )
