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
    pieces: list[_Piece] = []
    at, joint = 0, _PARAGRAPHS
    for part in (part for sentence in sentences(block.text) for part in _parts(sentence, fits)):
        text = part.strip()
        if text:
            lead = len(part) - len(part.lstrip())
            joint += part[:lead] if pieces else ""
            first, last = _places(block, at + lead, at + lead + len(text))
            pieces.append(_Piece(text, joint, first, last))
            joint = part[lead + len(text) :]
        else:
            joint += part
        at += len(part)
    return pieces


def _places(block: Block, start: int, end: int) -> tuple[int, int]:
    """Return the first and last line of a part of a block; those of the block if its lines are not those of the file."""
    if block.text.count("\n") != block.last - block.first:
        return block.first, block.last
    return block.first + block.text.count("\n", 0, start), block.first + block.text.count("\n", 0, end)


def _parts(sentence: str, fits: Callable[[str], bool]) -> Iterator[str]:
    """Yield a sentence, or parts of one that does not fit, each as long as possible. Joined, they are the sentence."""
    rest = sentence
    while rest and not fits(rest.strip()):
        end = _longest(rest, fits)
        breaks = [match.end() for match in _BREAK.finditer(rest, 0, end) if rest[: match.end()].strip()]
        # Checked again: with a tokenizer, a shorter text can have a token more.
        cut = next((place for place in reversed(breaks) if fits(rest[:place].strip())), end)
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _longest(text: str, fits: Callable[[str], bool]) -> int:
    """Return the length of the longest beginning that fits, by bisection; at least one character."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[:middle].strip()):
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
