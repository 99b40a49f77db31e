"""The physical limit: the arithmetic of the model on the same tokens, in plain passes without adapters, cache or padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from selfeval.backbone.body import text_body
from selfeval.bench.timing import Side, timed

__all__ = ["PASS_TOKENS", "PlainPasses", "limit_sides"]

PASS_TOKENS = (2048, 8192, 16384)
"""Tokens of a pass; the fastest counts."""


@dataclass(frozen=True)
class PlainPasses:
    """Passes over a number of tokens, in rows of one length.

    Attributes:
        model: causal model of transformers without adapters.
        tokens: tokens that are read.
        width: tokens of a row: the mean length of the texts, because attention is computed within a text.
        outputs: tokens whose logits are computed.
    """

    model: Any
    tokens: int
    width: int
    outputs: int

    @property
    def rows(self) -> int:
        return max(1, self.tokens // self.width)

    def sizes(self, wanted: Sequence[int] = PASS_TOKENS) -> list[int]:
        """Return the numbers of rows of a pass, without those that make no difference."""
        return sorted({min(self.rows, max(1, size // self.width)) for size in wanted})

    @torch.no_grad()
    def run(self, rows: int) -> None:
        """Read all tokens in passes of some rows."""
        vocabulary, device = self.model.get_input_embeddings().weight.shape[0], self.model.device
        # Longer rows in place of a short last one, so that `tokens` are read, up to a part of a token per row.
        width, outputs = max(1, round(self.tokens / self.rows)), self.outputs
        ids = (torch.arange(rows * width, device=device) % vocabulary).view(rows, width)
        body, head = text_body(self.model), self.model.get_output_embeddings()
        for start in range(0, self.rows, rows):
            count = min(rows, self.rows - start)
            states = body(input_ids=ids[:count], use_cache=False).last_hidden_state
            share = -(-outputs * count // self.rows)
            if share:
                head(states.flatten(0, 1)[:share])


def limit_sides(passes: PlainPasses) -> list[Side]:
    """Return one side per size of a pass."""
    width = max(1, round(passes.tokens / passes.rows))
    return [
        Side("limit", f"{rows * width:,} tokens a pass", partial(timed, partial(passes.run, rows), passes.model.device))
        for rows in passes.sizes()
    ]
