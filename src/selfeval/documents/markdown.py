"""Blocks of Markdown, by the CommonMark parser markdown-it-py.

Blocks are cut from the source, so their text keeps its marks: language models read Markdown as well as plain text, and a table
or a list keeps its form.
"""

from __future__ import annotations

from markdown_it import MarkdownIt

from selfeval.documents.blocks import Block
from selfeval.documents.plain_text import text_blocks

__all__ = ["markdown_blocks"]


def markdown_blocks(text: str) -> list[Block]:
    """Return the top-level blocks of a Markdown text: headings, paragraphs, lists, tables, quotes and code.

    Front matter, HTML comments and definitions of links are left out.

    Example:
        >>> markdown_blocks("# Rent\\n\\n- a bike\\n- a helmet\\n")
        [Block(text='Rent', first=1, last=1, level=1), Block(text='- a bike\\n- a helmet', first=3, last=4, level=0)]
    """
    skipped = _front_matter(text)
    lines = text.split("\n")
    body = "\n".join([""] * skipped + lines[skipped:])
    blocks: list[Block] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    for number, token in enumerate(tokens):
        if token.level or token.map is None or token.nesting < 0:
            continue
        first, last = token.map
        if token.type == "heading_open":
            title = tokens[number + 1].content.strip()
            blocks += [Block(title, first + 1, last, int(token.tag[1]))] if title else []
        elif not (token.type == "html_block" and token.content.lstrip().startswith("<!--")) and token.type != "hr":
            blocks += _whole("\n".join(lines[first:last]), first + 1)
    return blocks


def _whole(source: str, first: int) -> list[Block]:
    """Return the lines as one block, without the blank ones around them."""
    parts = text_blocks(source, first)
    if not parts:
        return []
    text = "\n".join(line.rstrip() for line in source.split("\n")).strip("\n")
    return [Block(text, parts[0].first, parts[-1].last)]


def _front_matter(text: str) -> int:
    """Return the number of lines of YAML front matter at the start."""
    lines = text.split("\n")
    if lines[0].rstrip() != "---":
        return 0
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() in ("---", "...")), None)
    return 0 if end is None else end + 1
