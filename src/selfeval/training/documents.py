"""Documents to fine-tune on: token ids with the mask of their loss, cut to length, held out, and packed into rows."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

__all__ = ["Document", "Row", "fit_documents", "held_out_indices", "hold_out", "pack_documents", "whole_text"]


@dataclass(frozen=True)
class Document:
    """A text that is read by itself.

    Attributes:
        ids: token ids.
        trained: per token, True where its loss counts. Nothing predicts the first token, so it never counts.
        cluster: documents of one cluster are not independent cases, such as the passages of one text.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cluster: int = 0

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.trained):
            raise ValueError(
                f"a document of {len(self.ids)} tokens has a mask of {len(self.trained)}; they must be equally long"
            )
        if self.trained[:1] == (True,):
            object.__setattr__(self, "trained", (False, *self.trained[1:]))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens whose loss counts."""
        return sum(self.trained)

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the first one whose loss counts."""
        return self.ids[: self.trained.index(True)] if True in self.trained else self.ids


Row = tuple[Document, ...]
"""Documents that share a row of a batch without attending to one another."""


def whole_text(ids: Sequence[int], cluster: int = 0) -> Document:
    """Return a document in which the loss of every token counts, but the first."""
    return Document(tuple(ids), (True,) * len(ids), cluster)


def fit_documents(documents: Sequence[Document], length: int, *, cut: bool) -> tuple[list[Document], int]:
    """Cut or drop the documents of more than `length` tokens, and drop those in which no loss is left.

    Args:
        documents: documents of any lengths.
        length: maximum tokens of a document.
        cut: keep the first `length` tokens of longer documents instead of dropping them.

    Returns:
        The documents that remain, and the number of those that were cut or dropped.
    """
    kept = [Document(d.ids[:length], d.trained[:length], d.cluster) for d in documents if cut or len(d) <= length]
    kept = [document for document in kept if document.trained_tokens]
    changed = sum(len(d) > length or not d.trained_tokens for d in documents)
    return kept, changed


def hold_out(documents: Sequence[Document], share: float, seed: str) -> tuple[list[Document], list[Document]]:
    """Split documents at random into those to train on and held-out ones; documents with the same prompt stay together.

    Args:
        documents: the documents.
        share: share of held-out documents; at least one is held out if it is above 0, and at least one prompt is trained on.
        seed: seed of the split.

    Returns:
        Training documents and held-out documents, each in their given order. If all have the same prompt, none is held out.
    """
    held = held_out_indices([document.prompt for document in documents], share, seed)
    train = [document for index, document in enumerate(documents) if index not in held]
    return train, [documents[index] for index in sorted(held)]


def held_out_indices(keys: Sequence[Hashable], share: float, seed: str) -> set[int]:
    """Return the indices that `hold_out` holds out, of items with these keys; items with the same key stay together."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    groups = list(found.values())
    random.Random(seed).shuffle(groups)
    wanted = max(1, round(share * len(keys))) if share > 0 else 0
    held: set[int] = set()
    for group in groups[1:]:
        if len(held) >= wanted:
            break
        held.update(group)
    return held


def pack_documents(documents: Sequence[Document], length: int) -> list[Row]:
    """Pack documents into rows of at most `length` tokens without cutting any: best-fit decreasing.

    Documents are placed from the longest to the shortest, each in the row in which it leaves the least space (Ding et al. 2024,
    https://arxiv.org/abs/2404.10830).

    Args:
        documents: documents of at most `length` tokens.
        length: maximum tokens of a row.

    Example:
        >>> texts = [whole_text(range(n)) for n in (3, 5, 2, 4)]
        >>> [[len(document) for document in row] for row in pack_documents(texts, 7)]
        [[5, 2], [4, 3]]
    """
    rows: list[list[Document]] = []
    spaces: list[tuple[int, int]] = []  # free tokens and index of each row, ascending
    for document in sorted(documents, key=len, reverse=True):
        place = bisect_left(spaces, (len(document), 0))
        if place == len(spaces):
            space, index = length, len(rows)
            rows.append([])
        else:
            space, index = spaces.pop(place)
        rows[index].append(document)
        insort(spaces, (space - len(document), index))
    return [tuple(row) for row in rows]
