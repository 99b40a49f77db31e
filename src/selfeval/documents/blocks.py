"""The common form of documents: blocks of text (headings, paragraphs, lists, tables) with their place in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Block", "Document", "Unit"]

Unit = Literal["lines", "pages"]
"""Unit of the places in a document."""


@dataclass(frozen=True)
class Block:
    """A block of a document.

    Attributes:
        text: its text, not empty; Markdown keeps its marks, except those of headings.
        first, last: its first and last line or page, counted from 1.
        level: level of a heading, from 1; 0 for any other block. Default: 0.
    """

    text: str
    first: int
    last: int
    level: int = 0


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        name: path that messages and seeds show, relative to the folder that was passed; with that folder, if two documents
            have the same one.
        unit: unit of the places of its blocks.
        blocks: its blocks in order.
    """

    name: str
    unit: Unit
    blocks: tuple[Block, ...]
