"""Control tokens of a tokenizer: which they are, how they are kept out of texts, and which one ends a turn of a chat.

Control tokens are the special tokens, and the markers that the chat template puts around messages, whether these are special
tokens, added tokens that nobody marked as special (DeepSeek's `<｜User｜>`), or plain text (Zephyr's `<|user|>`). Other added
tokens are vocabulary: a drug's name, `<b>`, runs of spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["NEW_PAD", "ControlTokens", "EndOfTurn", "end_of_turn", "sample_ids"]

NEW_PAD = "<|pad|>"
"""Padding token of an exported classifier whose tokenizer has none to spare; no text may hold it."""

_USER, _ASSISTANT = "QuestionSentinel", "ReplySentinel"
_MARKER = re.compile(r"<[|｜]?/?\w[^<>\n]{0,40}[|｜]?>|\[/?[A-Z][A-Z_]{2,30}\]")
"""A marker of a chat template: `<|user|>`, `<｜User｜>`, `<start_of_turn>`, `[/INST]`."""


@dataclass(frozen=True, eq=False)
class ControlTokens:
    """The control tokens of one tokenizer, with its chat template as it is now."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens; not of words that were declared special but that texts consist of (a padding token "!")."""
        return frozenset(i for i, text in self._special.items() if not self._is_word(i, text))

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Strings that inserted text must not contain, longest first."""
        ends = {self.tokenizer.eos_token, self.tokenizer.bos_token}
        special = {text for text in self._special.values() if not _looks_like_word(text) or (text in ends and text.strip())}
        return tuple(sorted({NEW_PAD} | special | self._markers, key=lambda text: (-len(text), text)))

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids of all control tokens, those of the chat template's markers included."""
        vocabulary = self.tokenizer.get_added_vocab()
        return self.special_ids | {i for text, i in vocabulary.items() if text in self.texts}

    @cached_property
    def forbidden_ids(self) -> frozenset[int]:
        """Ids that no text may become: not that of unknown letters, which is no attack, unless it also ends or begins texts."""
        tokenizer = self.tokenizer
        other_uses = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        unknown = tokenizer.unk_token_id
        return self.ids if unknown in other_uses else self.ids - {unknown}

    def clean(self, text: str) -> str:
        """`text` with a space for every control token in it, stripped; nothing that is left makes one.

        A token may come together only when another is taken out of its middle, or by the tokenizer's normalisation of case
        and of Unicode forms, so this is repeated until the tokenizer itself finds none.
        """
        text = self._without_texts(text)
        while (found := self._without_ids(text)) != text:
            text = self._without_texts(found)
        return text.strip()

    def without_special(self, ids: Iterable[int]) -> list[int]:
        """`ids` without special tokens."""
        return [int(i) for i in ids if int(i) not in self.special_ids]

    # -- which they are -------------------------------------------------------------------------------------------------

    @cached_property
    def _special(self) -> dict[int, str]:
        tokenizer: Any = self.tokenizer
        marked = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        return marked | {int(i): str(text) for i, text in named if i is not None}

    def _is_word(self, index: int, text: str) -> bool:
        return _looks_like_word(text) and index in self.tokenizer.encode(text, add_special_tokens=False)

    @cached_property
    def _markers(self) -> set[str]:
        """Markers of the chat template: those around messages, and added tokens that its source names."""
        source = _template_source(self.tokenizer)
        if not source:
            return set()
        around = set(_MARKER.findall(_conversation(self.tokenizer) or ""))
        named = {text for text in self.tokenizer.get_added_vocab() if text in source and _MARKER.fullmatch(text.strip())}
        return around | named

    # -- taking them out ------------------------------------------------------------------------------------------------

    def _without_texts(self, text: str) -> str:
        before = None
        while text != before:
            before = text
            for token in self.texts:
                text = text.replace(token, " ")
        return text

    def _without_ids(self, text: str) -> str:
        """`text` without what the tokenizer makes a control token of."""
        tokenizer: Any = self.tokenizer
        if not tokenizer.is_fast:
            ids = tokenizer.encode(text, add_special_tokens=False)
            kept = [i for i in ids if i not in self.ids]
            return text if len(kept) == len(ids) else str(tokenizer.decode(kept))
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = zip(found["input_ids"], found["offset_mapping"], strict=True)
        # From the end, so the offsets of earlier tokens stay valid.
        for start, stop in reversed([span for i, span in spans if i in self.forbidden_ids and span[1] > span[0]]):
            text = f"{text[:start]} {text[stop:]}"
        return text


def _looks_like_word(text: str) -> bool:
    """Whether a token is a word, a sign or white space, and no markup."""
    text = text.strip()
    return len(text) <= 1 or all(sign.isalnum() or sign in " -'" for sign in text)


def _template_source(tokenizer: Any) -> str:
    return str(tokenizer.get_chat_template()) if getattr(tokenizer, "chat_template", None) else ""


def _conversation(tokenizer: Any) -> str | None:
    """The chat template's text around user, assistant and user, or as many as it takes; None where it takes no user."""
    plain = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "user", "content": _USER},
    ]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    # Some templates take content as a string only, others as a list of parts only, and some refuse a second turn.
    for messages in (plain, parts, plain[:2], parts[:2], plain[:1], parts[:1]):
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=len(messages) != 2))
        except Exception:  # a template's own code: it may raise anything, and says no to messages by raising
            continue
        if _USER in text and (_ASSISTANT in text or len(messages) == 1):  # some drop a plain string, or a list of parts
            return text
    return None


@dataclass(frozen=True)
class EndOfTurn:
    """Text that the chat template appends to an assistant message; `id` is None if it is not a single token."""

    text: str
    id: int | None


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn | None:
    """The control token that the chat template puts behind an assistant's message; None without one.

    Many models end their turns with a token that no config names as end of sequence: they would write on to the limit.
    """
    text = _conversation(tokenizer) if _template_source(tokenizer) else None
    if text is None or _ASSISTANT not in text:
        return None
    behind = text.split(_ASSISTANT)[-1].lstrip()
    found = next((token for token in ControlTokens(tokenizer).texts if behind.startswith(token)), None)
    if found is None or found == tokenizer.bos_token:
        return None
    index = tokenizer.get_vocab().get(found)
    is_token = index is not None and tokenizer.encode(found, add_special_tokens=False) == [index]
    return EndOfTurn(found, index if is_token else None)


def sample_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Encode a short text and a conversation in the chat template, the building blocks of every prompt."""
    texts = [_USER, _conversation(tokenizer) or "" if _template_source(tokenizer) else ""]
    plain = tokenizer.encode(texts[0], add_special_tokens=True)
    return {int(i) for i in [*plain, *tokenizer.encode(texts[1], add_special_tokens=False)]}
