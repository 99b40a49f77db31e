"""The split of plain text and conversations into a part to train on and a held-out part without near-copies of the former."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from selfeval.quality.near_copies import copied, copy_groups
from selfeval.training.documents import held_out_indices

__all__ = ["Passage", "TextSplit", "held_out_conversations", "split_texts"]

_WHOLE_DOCUMENTS = 20
_PARTS = 20
"""Parts of the held-out ends of a few documents, over which an interval is computed."""
_MOST_HELD_OUT = 200_000
"""Characters that are held out at most: enough for a narrow interval, and the rest is better trained on."""
_BORDERS = (r"\n[^\S\n]*\n\s*", r"\n+", r"(?<=[.!?])\s+|(?<=[。！？])")
"""Borders of the pieces of a text: paragraphs, otherwise lines, otherwise sentences."""


@dataclass(frozen=True)
class Passage:
    """Held-out text.

    Attributes:
        text: the text.
        cluster: passages of one cluster are not independent: those of one document and of its copies, or of neighbouring text.
    """

    text: str
    cluster: int


@dataclass(frozen=True)
class TextSplit:
    """Text to train on and held-out text.

    Attributes:
        train: the texts to train on, without empty ones.
        held: the held-out passages.
        clusters: name of the clusters, for messages.
        left_out: characters of the ends that are neither trained on nor held out, because the text to train on has a copy.
        refused: characters of whole documents that were drawn, and are trained on, because they and their near-copies are too
            much of the text.
    """

    train: list[str]
    held: list[Passage]
    clusters: str
    left_out: int = 0
    refused: int = 0


def split_texts(documents: Sequence[str], share: float, seed: str) -> TextSplit:
    """Split text into a part to train on and a held-out part, at most about `_MOST_HELD_OUT` characters.

    Args:
        documents: from `_WHOLE_DOCUMENTS` documents on, whole ones are held out at random, together with their near-copies; of
            fewer, the end of each, without the paragraphs that have a near-copy in the text to train on.
        share: share of the text.
        seed: seed of the draw.
    """
    share = min(share, _MOST_HELD_OUT / max(1, sum(map(len, documents))))
    documents = [document for document in documents if document.strip()]
    return _ends(documents, share) if len(documents) < _WHOLE_DOCUMENTS else _whole(documents, share, seed)


def held_out_conversations(texts: Sequence[str], prompts: Sequence[Hashable], share: float, seed: str) -> list[list[int]]:
    """Return the groups of conversations to hold out; near-copies and those with the same prompt stay together.

    Args:
        texts: the whole text of each conversation.
        prompts: what it asks.
        share: share of the conversations.
        seed: seed of the draw.
    """
    drawn = held_out_indices(prompts, share, seed)
    groups = copy_groups(
        texts, sorted(drawn, key=random.Random(seed).sample(range(len(texts)), len(texts)).__getitem__), prompts
    )
    return list(_fitting(groups, len(drawn), len(texts), len))


def _whole(documents: Sequence[str], share: float, seed: str) -> TextSplit:
    order, wanted = list(range(len(documents))), share * sum(map(len, documents))
    random.Random(seed).shuffle(order)
    chosen, characters = list[int](), 0
    for index in order:
        if characters + len(documents[index]) / 2 >= wanted and chosen:
            break
        chosen.append(index)
        characters += len(documents[index])

    def size(group: Sequence[int]) -> int:
        return sum(len(documents[index]) for index in group)

    drawn = copy_groups(documents, chosen)
    groups = list(_fitting(drawn, characters, size(order), size))
    held = {index for group in groups for index in group}
    train = [document for index, document in enumerate(documents) if index not in held]
    passages = [Passage(documents[index], number) for number, group in enumerate(groups) for index in group]
    refused = sum(map(size, drawn)) - sum(map(size, groups))
    return TextSplit(train, passages, "documents", refused=refused)


def _fitting(groups: Sequence[list[int]], wanted: int, total: int, size: Callable[[Sequence[int]], int]) -> Iterator[list[int]]:
    """Yield the groups up to about the wanted size. A group that is much too large is trained on instead."""
    found = 0
    for group in groups:
        # The first may be larger than wanted, but most of the text is trained on.
        if found + size(group) <= max(1.5 * wanted, 0 if found else total / 2):
            found += size(group)
            yield group


def _ends(documents: Sequence[str], share: float) -> TextSplit:
    parts = [_cut_end(document, share) for document in documents]
    train = [start for start, _ in parts if start.strip()]
    border = _border([end for _, end in parts])
    pieces = [(number, piece) for number, (_, end) in enumerate(parts) for piece in _pieces(end, border)]
    is_copy = copied([piece for _, piece in pieces], (piece for text in train for piece in _pieces(text, border)))
    total = sum(len(piece) for _, piece in pieces)
    kept, position, last = list[tuple[tuple[int, int], str]](), 0, None
    for place, (number, piece) in enumerate(pieces):
        key = (number, _PARTS * position // max(1, total))
        position += len(piece)
        if place in is_copy or not piece.strip():
            last = None
        elif key == last:
            kept[-1] = (key, kept[-1][1] + piece)
        else:
            kept.append((key, piece))
            last = key
    held = [Passage(text, cluster) for (_, cluster), text in kept]
    return TextSplit(train, held, "parts of the documents' ends", sum(len(pieces[place][1]) for place in is_copy))


def _cut_end(text: str, share: float) -> tuple[str, str]:
    place = len(text) - round(share * len(text))
    end = len(text.rstrip())  # nothing would be held out after the last sign
    found = next((found for sign in "\n 。" if (found := text.find(sign, place, min(place + 2000, end))) >= 0), -1)
    return (text, "") if found < 0 else (text[: found + 1], text[found + 1 :])


def _border(texts: Sequence[str]) -> str:
    """Return the largest pieces of which there are enough."""
    return next((border for border in _BORDERS if sum(len(_pieces(text, border)) for text in texts) >= _PARTS), _BORDERS[-1])


def _pieces(text: str, border: str) -> list[str]:
    """Cut a text after each border; joined, the pieces are the text."""
    ends = [match.end() for match in re.finditer(border, text)]
    return [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True) if start < stop]
