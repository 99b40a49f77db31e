"""New tokens for a model's own BPE tokenizer, learnt from text.

The merges of the tokenizer stay as they are, and the new ones follow with lower priority. So a text is first split exactly as
before, and only then new merges join some of the tokens. A new token therefore always stands for a fixed sequence of old ones,
its pieces, and no text needs more tokens than before.

Three kinds of text units never get into one token: units that the pre-tokenizer separates; words, numbers, punctuation and
line breaks of tokenizers without a pre-tokenizer (those converted from SentencePiece, which separated them in training); and
control tokens with what surrounds them. A new token of a byte-level tokenizer has whole characters, or is a part of one.

Not supported: Unigram and WordPiece tokenizers. Pieces of the former need probabilities, and added tokens are found anywhere,
also in the middle of other words. Tokenizers outside of the `tokenizers` library have no merges that could be extended.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from selfeval.backbone.tokens import ControlTokens
from selfeval.backbone.vocabulary.merges import learn_merges
from selfeval.errors import ModelError

__all__ = ["BpeTokenizer", "NewToken", "expanded"]

_CHUNK = 1 << 16
"""Characters of a document that are split into words at a time, cut at line breaks."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A token that stands for a byte, in tokenizers with `byte_fallback`."""
_WORDS = Regex(r"▁?[\p{L}\p{M}]+|▁?\p{N}|▁?[^\s▁\p{L}\p{M}\p{N}]+|\n+|▁+|\s")
"""Units of a text without a pre-tokenizer, in which ▁ stands for a space."""


@dataclass(frozen=True)
class NewToken:
    """A token that is added to a tokenizer.

    Attributes:
        text: the token as the vocabulary writes it.
        parts: the two tokens that its merge joins; empty for a character that had no token.
        pieces: ids of the old tokens that it stands for.
    """

    text: str
    parts: tuple[str, ...]
    pieces: tuple[int, ...]


class BpeTokenizer:
    """A fast BPE tokenizer that can be extended.

    Args:
        tokenizer: of the model.
        name: of the model, for messages.

    Raises:
        ModelError: it is of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self._tokenizer: Any = tokenizer
        self._core: Tokenizer = _core_of(tokenizer, name)
        self.values: dict[str, Any] = json.loads(self._core.to_str())
        model = self.values["model"]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
            kind = model["type"] if model["type"] != "BPE" else "BPE with a prefix for the inside of words"
            raise ModelError(
                f"the tokenizer of {name} is a {kind} model, whose vocabulary cannot be extended by merges; use a model with a "
                "BPE tokenizer (Llama, Qwen, Mistral, Gemma and most others), or tune without --extend-vocabulary"
            )
        self._texts: dict[int, str] = {index: text for text, index in model["vocab"].items()}
        self._added: dict[str, int] = {token["content"]: token["id"] for token in self.values["added_tokens"]}
        self.is_byte_level = "ByteLevel" in _kinds(self.values["pre_tokenizer"]) | _kinds(self.values["normalizer"])

    @property
    def first_free(self) -> int:
        """The first id above those of all tokens."""
        return max([*self._texts, *self._added.values()]) + 1

    # -- learning ---------------------------------------------------------------------------------------------------------

    def learn(self, texts: Iterable[str], count: int, first: int) -> list[NewToken]:
        """Learn new tokens from text, the one that saves most tokens first.

        Args:
            texts: documents.
            count: maximum number of new tokens.
            first: id of the first new token; the others follow.

        Returns:
            The new tokens, fewer than `count` if the text has no more; see `learn_merges`.
        """
        characters: dict[str, int] = {}
        words: Counter[tuple[int, ...]] = Counter()
        for unit, number in self._units(texts).items():
            words[self._symbols(unit, characters)] += number
        growing = _Growing(self, first, {symbol: text for text, symbol in characters.items()})
        saved_by = {symbol: len(text.encode()) - 1 for text, symbol in characters.items()}
        learn_merges(words, count, first, closed=self._closed, saved_by=saved_by, accept=growing.accept)
        return growing.tokens

    def _units(self, texts: Iterable[str]) -> Counter[str]:
        """Count the units of the texts whose tokens are found separately."""
        found: Counter[str] = Counter()
        for text in texts:
            for part in self._separators.split(text):
                for chunk in _chunks(part):
                    found.update(self._split(chunk))
        return found

    def _split(self, text: str) -> list[str]:
        core = self._core
        normal = text if core.normalizer is None else core.normalizer.normalize_str(text)
        units = [normal] if core.pre_tokenizer is None else [unit for unit, _ in core.pre_tokenizer.pre_tokenize_str(normal)]
        if self.is_byte_level:
            return units
        words = pre_tokenizers.Split(_WORDS, "isolated")
        return [word for unit in units for word, _ in words.pre_tokenize_str(unit)]

    def _symbols(self, unit: str, characters: dict[str, int]) -> tuple[int, ...]:
        """Return the tokens of a unit. A character that is written as bytes is one negative symbol, which is added if new."""
        found: list[int] = []
        encoded = bytearray()
        for token in self._core.model.tokenize(unit):
            byte = self._bytes.get(token.id)
            if byte is None:
                found.append(token.id)
                continue
            encoded.append(byte)
            # An incomplete character decodes to nothing.
            if text := encoded.decode("utf-8", errors="ignore"):
                found.append(characters.setdefault(text, -1 - len(characters)))
                encoded.clear()
        return tuple(found)

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """The byte of each token that stands for one; empty for tokenizers that write bytes as characters."""
        if not self.values["model"].get("byte_fallback"):
            return {}
        found = ((index, _BYTE.fullmatch(text)) for index, text in self._texts.items())
        return {index: int(match[1], 16) for index, match in found if match}

    @cached_property
    def _closed(self) -> list[int]:
        unknown = self.values["model"].get("unk_token")
        ids = {*self._added.values(), *([] if unknown is None else [self.values["model"]["vocab"][unknown]])}
        return sorted(index for index in ids if index in self._texts)

    @cached_property
    def _control(self) -> tuple[str, ...]:
        return ControlTokens(self._tokenizer).texts

    @cached_property
    def _separators(self) -> re.Pattern[str]:
        texts = sorted({*self._control, *self._added}, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, texts)))

    @cached_property
    def kept_pairs(self) -> frozenset[tuple[int, int]]:
        """Pairs of tokens within control tokens that are plain text, such as `<|user|>`: they must keep their tokens."""
        plain = [text for text in self._control if text not in self._added]
        return frozenset(pair for text in plain for pair in pairwise(self._core.encode(text, add_special_tokens=False).ids))

    def text_of(self, index: int) -> str:
        """Return a token as the vocabulary writes it."""
        return self._texts[index]

    def pieces_of(self, text: str) -> tuple[int, ...]:
        """Return the old tokens of a unit."""
        return tuple(token.id for token in self._core.model.tokenize(text))

    def has(self, text: str) -> bool:
        """Return whether there is such a token."""
        return text in self.values["model"]["vocab"] or text in self._added

    # -- the extended tokenizer -------------------------------------------------------------------------------------------

    def extended(self, tokens: Sequence[NewToken], first: int) -> dict[str, Any]:
        """Return the content of tokenizer.json with new tokens.

        Args:
            tokens: the new tokens.
            first: id of the first one.
        """
        values: dict[str, Any] = json.loads(self._core.to_str())
        model = values["model"]
        # `tokenizers` numbers added tokens from the size of the vocabulary on, unless the vocabulary has them with their ids.
        model["vocab"] |= {text: index for text, index in self._added.items() if text not in model["vocab"]}
        model["vocab"] |= {token.text: first + number for number, token in enumerate(tokens)}
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [*merges, *(list(token.parts) for token in tokens if token.parts)]
        return values


class _Growing:
    """The new tokens so far.

    Args:
        base: the tokenizer.
        first: id of the first new token.
        characters: the character of each negative symbol.
    """

    def __init__(self, base: BpeTokenizer, first: int, characters: Mapping[int, str]) -> None:
        self._base, self._first, self._characters = base, first, characters
        self._is_exact = bool(base.values["model"].get("ignore_merges"))
        self.tokens: list[NewToken] = []
        self._taken: set[str] = set()

    def accept(self, symbols: tuple[int, ...]) -> bool:
        """Add a token if it may exist."""
        token = self._token(symbols)
        if symbols in self._base.kept_pairs or token.text in self._taken or self._base.has(token.text):
            return False
        if self._base.is_byte_level and not _has_whole_characters(token.text):
            return False
        # With `ignore_merges`, a unit that is a token is found by its text. Its pieces must then be those of the text.
        if self._is_exact and self._base.pieces_of(token.text) != token.pieces:
            return False
        self.tokens.append(token)
        self._taken.add(token.text)
        return True

    def _token(self, symbols: tuple[int, ...]) -> NewToken:
        if len(symbols) == 1:
            text = self._characters[symbols[0]]
            return NewToken(text, (), self._base.pieces_of(text))
        parts = tuple(self._text(symbol) for symbol in symbols)
        return NewToken("".join(parts), parts, tuple(piece for symbol in symbols for piece in self._pieces(symbol)))

    def _text(self, symbol: int) -> str:
        return self._base.text_of(symbol) if symbol < self._first else self.tokens[symbol - self._first].text

    def _pieces(self, symbol: int) -> tuple[int, ...]:
        return (symbol,) if symbol < self._first else self.tokens[symbol - self._first].pieces


def expanded(ids: Iterable[int], pieces: Mapping[int, Sequence[int]]) -> list[int]:
    """Replace new tokens by their pieces.

    Example:
        >>> expanded([5, 9, 6], {9: (1, 2, 1)})
        [5, 1, 2, 1, 6]
    """
    return [piece for index in ids for piece in pieces.get(index, (index,))]


def _core_of(tokenizer: Any, name: str) -> Tokenizer:
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(core, Tokenizer):
        raise ModelError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) is not one of the library tokenizers, so its vocabulary "
            "cannot be extended; use a model with a tokenizer.json, or tune without --extend-vocabulary"
        )
    return core


def _kinds(part: Mapping[str, Any] | None) -> set[str]:
    """Return the types of a normalizer or pre-tokenizer and of its parts."""
    if part is None:
        return set()
    inner = [*part.get("pretokenizers", ()), *part.get("normalizers", ())]
    return {str(part["type"])}.union(*map(_kinds, inner))


def _chunks(text: str) -> Iterator[str]:
    """Cut a text after line breaks into parts of about `_CHUNK` characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _CHUNK) + 1
        yield text[start : stop or len(text)]
        start = stop or len(text)


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def _has_whole_characters(text: str) -> bool:
    """Return whether a byte-level token is whole characters, or bytes of a single one."""
    encoded = bytes(_BYTE_OF[character] for character in text if character in _BYTE_OF)
    try:
        encoded.decode("utf-8")
    except UnicodeDecodeError:
        # A byte from 0x80 to 0xBF continues a character.
        return all(0x80 <= byte <= 0xBF for byte in encoded[1:]) and encoded[0] >= 0x80
    return True
