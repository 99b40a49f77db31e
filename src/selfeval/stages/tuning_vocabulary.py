"""The vocabulary extension of a tuning: tokens learnt from its text, a base with rows for them, and their effect.

The tokens and the larger base are in OUT.tuning/vocabulary, and an interrupted tuning uses them again. The role trains on that
base, so the model's own folder is never changed.

The effect is measured on the same held-out text with both vocabularies. A new token stands for a fixed sequence of old ones, so
the text before the extension is the text after it with every new token replaced by its pieces. The base reads it with the
output layer cut to the old tokens: its loss is that of the model as it was, except that free rows, which new tokens take, are
not in the softmax. Losses per token of two vocabularies cannot be compared, losses per character can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.backbone.check import ModelParts, errors_of_model, read_parts
from selfeval.backbone.fingerprint import model_identity
from selfeval.backbone.roles import Backbone
from selfeval.backbone.vocabulary.folder import check_extendable, first_new_id, write_extended
from selfeval.backbone.vocabulary.tokenizer import BpeTokenizer, NewToken, expanded
from selfeval.config import RunConfig
from selfeval.errors import RunFolderError, TextError
from selfeval.quality.statistics import clustered_ratio
from selfeval.stages.terminal import Terminal
from selfeval.stages.tuning_rows import Source
from selfeval.store import RunStore, file_hash, fingerprint, read_object, write_json, writing
from selfeval.training.documents import Document, Row
from selfeval.training.sft import document_losses

__all__ = ["VOCABULARY", "Vocabulary", "check_vocabulary", "extend_vocabulary"]

VOCABULARY = "vocabulary"
"""Folder of the new tokens and the larger base in the working folder."""
_FILE = "vocabulary.json"


@dataclass(frozen=True)
class Vocabulary:
    """New tokens and the base that has rows for them.

    Attributes:
        model: folder of the base.
        first: id of the first new token.
        pieces: for each new token, the ids of the old tokens that it stands for.
        facts: wanted and added tokens, numbers of tokens and of rows before and after.
    """

    model: Path
    first: int
    pieces: Sequence[tuple[int, ...]]
    facts: Mapping[str, int]

    def effect(self, backbone: Backbone, role: str, rows: Sequence[Row], batch_tokens: int, clusters: str) -> dict[str, Any]:
        """Return the facts with characters per token and loss per character on held-out text, before and after.

        Before is the base as it was, untuned, so the change is that of the tuning and of the new tokens together.

        Args:
            backbone: has the trained role.
            role: name of the role.
            rows: held-out rows. Intervals are computed over the clusters of their documents.
            batch_tokens: maximum tokens of a micro-batch.
            clusters: name of the clusters.
        """
        after = [document for row in rows for document in row]
        pieces = {self.first + number: old for number, old in enumerate(self.pieces)}
        both = [(_with_pieces(document, pieces), document) for document in after]
        longest = backbone.loaded.context_length
        # The same text is longer in old tokens.
        both = [(old, new) for old, new in both if longest is None or len(old) <= longest]
        if not both:
            return dict(self.facts)
        olds, news = [old for old, _ in both], [new for _, new in both]
        characters = [_characters(backbone, document) for document in news]
        before = document_losses(backbone, BASE, olds, batch_tokens, vocabulary=self.first)
        now = document_losses(backbone, role, news, batch_tokens)
        change = [b - a for a, b in zip(before, now, strict=True)]
        cluster_N = [document.cluster for document in news]
        tokens_old, tokens_new = ([each.trained_tokens for each in read] for read in (olds, news))
        figures = {
            "characters_per_token_before": clustered_ratio(characters, tokens_old, cluster_N),
            "characters_per_token": clustered_ratio(characters, tokens_new, cluster_N),
            "loss_per_character_before": clustered_ratio(before, characters, cluster_N),
            "loss_per_character": clustered_ratio(now, characters, cluster_N),
            "loss_per_character_change": clustered_ratio(change, characters, cluster_N),
        }
        facts = {"before": "untuned base", "characters": sum(characters), "clusters": clusters}
        return {**self.facts, **facts} | {name: figure.as_json() for name, figure in figures.items()}


def check_vocabulary(config: RunConfig, *, trust_remote_code: bool) -> None:
    """Refuse a model whose vocabulary cannot be extended, before a folder is created.

    Raises:
        ModelError: see `check_extendable`.
    """
    if config.tuning.extend_vocabulary:
        check_extendable(_parts(config, trust_remote_code, download=False), config.model)


def extend_vocabulary(
    config: RunConfig, source: Source, store: RunStore, terminal: Terminal, *, trust_remote_code: bool
) -> Vocabulary | None:
    """Learn new tokens and write a base with rows for them, unless an earlier call did; None if no extension is configured.

    Args:
        config: model and tuning.
        source: origin of the text; held-out text is not learnt from.
        store: the working folder.
        terminal: shows progress.
        trust_remote_code: run code that comes with the model.

    Raises:
        TextError: the text has no new token.
        ModelError: the vocabulary of this model cannot be extended.
    """
    wanted = config.tuning.extend_vocabulary
    if not wanted:
        return None
    texts = source.texts(config)
    folder = store.root / VOCABULARY
    parts = _parts(config, trust_remote_code, download=True)
    key = fingerprint([model_identity(config.model), wanted, _digest(texts)])
    found = _read(folder, key)
    if found is None:
        with terminal.waiting("learning new tokens"):
            tokenizer = BpeTokenizer(parts.tokenizer, config.model)
            first = first_new_id(parts, tokenizer)
            tokens = tokenizer.learn(texts, wanted, first)
        if not tokens:
            raise TextError(
                f"the text of {sum(map(len, texts)):,} characters has no new token: every sequence of tokens that occurs at "
                "least twice within a word is one token already; add text, or tune without --extend-vocabulary"
            )
        with terminal.waiting("writing the model with new tokens"):
            _write(folder, key, parts, config, tokens, first, trust_remote_code)
        found = _read(folder, key)
        assert found is not None
    _say(terminal, found.facts)
    return found


def _parts(config: RunConfig, trust_remote_code: bool, *, download: bool) -> ModelParts:
    return read_parts(config.model, trust_remote_code=trust_remote_code, context=config.backbone.context, download=download)


def _digest(texts: Sequence[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(hashlib.sha256(text.encode()).digest())
    return found.hexdigest()


def _write(
    folder: Path,
    key: str,
    parts: ModelParts,
    config: RunConfig,
    tokens: Sequence[NewToken],
    first: int,
    trust_remote_code: bool,
) -> None:
    name = Path(config.model).name  # the model card names the base by its folder
    with writing(folder) as part:
        (part / name).mkdir(parents=True)
        with errors_of_model(config.model):
            rows = write_extended(parts, config.model, tokens, first, part / name, trust_remote_code=trust_remote_code)
        files = sorted(path for path in (part / name).rglob("*") if path.is_file())
        shell: Any = parts.shell
        facts = {
            "wanted": config.tuning.extend_vocabulary,
            "added": len(tokens),
            "tokens_before": first,
            "tokens": first + len(tokens),
            "rows_before": int(shell.get_input_embeddings().weight.shape[0]),
            "rows": rows,
        }
        written = {
            "key": key,
            "model": name,
            "first": first,
            "facts": facts,
            "pieces": [list(token.pieces) for token in tokens],
            "files": {path.relative_to(part).as_posix(): file_hash(path) for path in files},
        }
        write_json(part / _FILE, written)


def _read(folder: Path, key: str) -> Vocabulary | None:
    """Return the extension that an earlier call wrote; None if it is another one or damaged, and has to be written again."""
    try:
        saved = read_object(folder / _FILE, "key", "model", "first", "facts", "pieces", "files")
        if saved["key"] != key or any(file_hash(folder / path) != written for path, written in saved["files"].items()):
            return None
        pieces = [tuple(map(int, old)) for old in saved["pieces"]]
    except (OSError, RunFolderError, AttributeError, TypeError, ValueError):
        return None
    return Vocabulary(folder / saved["model"], int(saved["first"]), pieces, saved["facts"])


def _say(terminal: Terminal, facts: Mapping[str, int]) -> None:
    fewer = f" of {facts['wanted']:,}, because the text has no more," if facts["added"] < facts["wanted"] else ""
    grown = facts["rows"] - facts["rows_before"]
    rows = f"the embedding grows from {facts['rows_before']:,} to {facts['rows']:,} rows" if grown else "in free rows"
    terminal.note(f"{facts['added']:,} new tokens{fewer} after the {facts['tokens_before']:,} of the model; {rows}")


def _with_pieces(document: Document, pieces: Mapping[int, tuple[int, ...]]) -> Document:
    """Return a document in old tokens. The loss counts on the same characters."""
    trained = [
        counts for index, counts in zip(document.ids, document.trained, strict=True) for _ in pieces.get(index, (index,))
    ]
    return Document(tuple(expanded(document.ids, pieces)), tuple(trained), document.cluster)


def _characters(backbone: Backbone, document: Document) -> int:
    """Return the number of characters whose loss counts, at least 1."""
    ids = [index for index, counts in zip(document.ids, document.trained, strict=True) if counts]
    tokenizer: Any = backbone.loaded.tokenizer
    return max(1, len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)))
