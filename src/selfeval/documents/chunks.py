"""Chunks of a document: passages that are short enough for a prompt, cut at headings, paragraphs and sentences.

A chunk never crosses a heading. Within a section, blocks are packed in order up to the limit; a block over the limit is split
between sentences, and only a sentence over the limit is cut, at a space. No text of a block is lost or repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from selfeval.documents.blocks import Block, Document, Unit
from selfeval.documents.sentences import sentences

__all__ = ["Chunk", "chunks_of"]

_BREAK = re.compile(r"\s+|(?<=[，、,;；：:])")
_PARAGRAPHS = "\n\n"
_WINDOW = 512
"""Characters of the first attempt at a part; about half of a passage of the default limit."""


@dataclass(frozen=True)
class Chunk:
    """A passage of a document.

    Attributes:
        text: its text.
        headings: titles of the sections that contain it, outermost first.
        document: name of the document.
        unit: unit of the places.
        first, last: first and last line or page.
    """

    text: str
    headings: tuple[str, ...]
    document: str
    unit: Unit
    first: int
    last: int

    @property
    def passage(self) -> str:
        """The text under its headings, as the model reads it."""
        return _passage(self.headings, self.text)

    @property
    def source(self) -> dict[str, object]:
        """Where it is from, for the records."""
        return {"file": self.document, "headings": list(self.headings), self.unit: [self.first, self.last]}


def _passage(headings: Sequence[str], text: str) -> str:
    return f"{' > '.join(headings)}{_PARAGRAPHS}{text}" if headings else text


@dataclass(frozen=True)
class _Piece:
    """A part of a block; `joint` is the text between it and the piece before it."""

    text: str
    joint: str
    first: int
    last: int


def chunks_of(document: Document, limit: int, count: Callable[[str], int]) -> list[Chunk]:
    """Cut a document into chunks.

    Args:
        document: the document.
        limit: maximum number of tokens of a passage, headings included, >= 1.
        count: returns the number of tokens of a text.

    Returns:
        The chunks, in order. A single character that has more tokens than the limit is a chunk nevertheless.

    Raises:
        ValueError: the limit is not positive.
    """
    if limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    found: list[Chunk] = []
    for titles, blocks in _sections(document.blocks):
        headings = _shown(titles, limit, count)

        def fits(text: str, headings: tuple[str, ...] = headings) -> bool:
            return count(_passage(headings, text)) <= limit

        pieces = [piece for block in blocks for piece in _pieces(block, fits)]
        for packed in _packed(pieces, fits):
            text = packed[0].text + "".join(piece.joint + piece.text for piece in packed[1:])
            found.append(Chunk(text, headings, document.name, document.unit, packed[0].first, packed[-1].last))
    return found


def _sections(blocks: Sequence[Block]) -> Iterator[tuple[tuple[str, ...], list[Block]]]:
    """Yield the blocks between two headings, with the titles that they are under. A heading without text yields nothing."""
    path: list[Block] = []
    body: list[Block] = []
    for block in blocks:
        if not block.level:
            body.append(block)
            continue
        if body:
            yield tuple(heading.text for heading in path), body
            body = []
        path = [*(heading for heading in path if heading.level < block.level), block]
    if body:
        yield tuple(heading.text for heading in path), body


def _shown(titles: tuple[str, ...], limit: int, count: Callable[[str], int]) -> tuple[str, ...]:
    """Return the innermost titles that take at most half of the limit."""
    shown = tuple(" ".join(title.split()) for title in titles)
    while shown and 2 * count(_passage(shown, "")) > limit:
        shown = shown[1:]
    return shown


def _pieces(block: Block, fits: Callable[[str], bool]) -> list[_Piece]:
    """Split a block into pieces that fit: the whole block, its sentences, or parts of a sentence."""
    if fits(block.text):
        return [_Piece(block.text, _PARAGRAPHS, block.first, block.last)]
    # Pieces have their own lines, unless the lines of the block are not those of the file.
    follows = block.text.count("\n") == block.last - block.first
    pieces: list[_Piece] = []
    line, joint = block.first, _PARAGRAPHS
    for part in (part for sentence in sentences(block.text) for part in _parts(sentence, fits)):
        text = part.strip()
        if text:
            lead = len(part) - len(part.lstrip())
            joint += part[:lead] if pieces else ""
            first = line + part.count("\n", 0, lead)
            last = first + text.count("\n")
            pieces.append(_Piece(text, joint, *((first, last) if follows else (block.first, block.last))))
            joint = part[lead + len(text) :]
        else:
            joint += part
        line += part.count("\n")
    return pieces


def _parts(sentence: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Yield a sentence, or parts of one that does not fit, each as long as possible. Joined, they are the sentence."""
    start = 0
    while start < len(sentence):
        end = _longest(sentence, start, fits)
        if end < len(sentence):
            # Checked again: with a tokenizer, a shorter text can have a token more.
            end = next((place for place in _cuts(sentence, start, end) if fits(sentence[start:place].strip())), end)
        yield sentence[start:end]
        start = end


def _cuts(text: str, start: int, end: int) -> list[int]:
    """Return places to cut, best first: the last line break of the second half, then the last spaces and commas."""
    found = [match for match in _BREAK.finditer(text, start, end) if text[start : match.end()].strip()][::-1]
    lines = [match.end() for match in found if "\n" in match.group() and 2 * match.end() > start + end]
    return [*lines[:1], *(match.end() for match in found)]


def _longest(text: str, start: int, fits: Callable[[str], bool]) -> int:
    """Return the end of the longest part from a place on that fits, by bisection; at least one character.

    The search begins with a window that doubles, because counting the tokens of the whole rest for each part would take time
    that is quadratic in the length of the text.
    """
    low, high = start + 1, min(len(text), start + _WINDOW)
    while fits(text[start:high].strip()):
        if high == len(text):
            return high
        low, high = high, min(len(text), 2 * high - start)
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[start:middle].strip()):
            low = middle
        else:
            high = middle - 1
    return low


def _packed(pieces: Sequence[_Piece], fits: Callable[[str], bool]) -> Iterator[list[_Piece]]:
    """Yield runs of pieces that fit together."""
    packed: list[_Piece] = []
    text = ""
    for piece in pieces:
        longer = f"{text}{piece.joint}{piece.text}"
        if packed and not fits(longer):
            yield packed
            packed = []
        text = longer if packed else piece.text
        packed.append(piece)
    if packed:
        yield packed
