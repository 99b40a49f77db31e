"""Prompts of plain token ids, as most tests write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from selfeval.prompt import Prompt


def as_prompts(rows: Iterable[Sequence[int]]) -> list[Prompt]:
    """One prompt without images per row of token ids."""
    return [Prompt(tuple(row)) for row in rows]
