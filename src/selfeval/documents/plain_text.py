"""Blocks of plain text: paragraphs between blank lines."""

from __future__ import annotations

from selfeval.documents.blocks import Block

__all__ = ["text_blocks"]


def text_blocks(text: str, first: int = 1) -> list[Block]:
    """Return the paragraphs of a text.

    Args:
        text: text with line breaks as newlines.
        first: number of its first line. Default: 1.

    Example:
        >>> text_blocks("One\\nline.\\n\\nTwo.")
        [Block(text='One\\nline.', first=1, last=2, level=0), Block(text='Two.', first=4, last=4, level=0)]
    """
    blocks: list[Block] = []
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=first):
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            blocks.append(Block("\n".join(lines).strip(), number - len(lines), number - 1))
            lines = []
    return blocks
