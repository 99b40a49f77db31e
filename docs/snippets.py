"""The code blocks of a documentation page, as the tests and benchmarks/tutorials.py run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHELL", "Block", "blocks", "commands"]

SHELL = ("bash", "console", "sh", "shell")
"""Languages of a block of commands."""

_GENERATED = re.compile(r"<!-- (figures|generated)(: [^\n]*?)? -->\n.*?<!-- /\1 -->", re.DOTALL)
_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the word after the fence, or empty.
        title: the name of the file that the block is, or empty.
        text: the lines between the fences.
    """

    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order, without those that a generator writes."""
    text = _GENERATED.sub("", page.read_text(encoding="utf-8"))
    return [Block(*match.groups(default="")) for match in _FENCE.finditer(text)]


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a block, each on one line, without a prompt and without lines that are only a comment."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"\s+", " ", line).strip().removeprefix("$ ")
        if command and not command.startswith("#"):
            yield command
