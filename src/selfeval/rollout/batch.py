"""A batch of replies to a list of requests. Rows that end leave it, and waiting requests take their places.

`rows.py` has the rows themselves, and how they share a cache; `live.py` has a batch to which requests are added while it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from selfeval.backbone.roles import Backbone
from selfeval.rollout.draws import row_draws
from selfeval.rollout.guide import Guide
from selfeval.rollout.passes import Pass, passes
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.rows import Row, Rows, joins_rows
from selfeval.rollout.thinking import ThinkingTokens

__all__ = ["SLACK", "Batch"]

_REFILL = 8
"""Rows join when an eighth of the places is free, because reading a single prompt costs almost as much as reading a few."""
SLACK = 8
"""An eighth more columns than a row can have, so that the columns of a running batch rarely have to move to the front."""


class Batch:
    """State of one batch during sampling.

    Args:
        backbone: backbone with an acting role.
        requests: one per reply; the longest prompt comes first if there are fewer places.
        numbers: index of each request, which selects its random stream.
        limit: maximum number of new tokens per reply.
        stop, watch, seed, guide, thinking: as in `generate`.
        places: Optional. Number of rows at a time. Default: all requests.
        ended: Optional. Is called with the index and the reply of each request that is finished.

    Attributes:
        rows: the rows that are being sampled.
    """

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[Request],
        numbers: Sequence[int],
        limit: int,
        stop: Sequence[int],
        watch: Sequence[int],
        seed: int,
        guide: Guide | None,
        thinking: ThinkingTokens | None = None,
        places: int | None = None,
        ended: Callable[[int, Rollout], None] | None = None,
    ) -> None:
        rows = [
            Row(backbone, request, limit, thinking, ended=partial(ended, index) if ended else None)
            for index, request in enumerate(requests)
        ]
        most = max(row.progress.most for row in rows)
        # Draw all random numbers in advance, so a row's number at a step does not depend on which rows are still alive.
        if any(r.temperature for r in requests):
            for row, draws in zip(rows, row_draws(seed, numbers, most), strict=True):
                row.draws = draws
        self._waiting = deque(rows)
        self._places = len(rows) if places is None else min(places, len(rows))
        width = max(len(r.prompt.ids) for r in requests)
        room = most + ((width + most) // SLACK if self._places < len(rows) else 0)
        joins = joins_rows(backbone, guide)
        assert joins or self._places == len(rows), "rows cannot join a batch of this model"
        parts = (
            [Pass(backbone, (), True, room, self._places, width)]
            if joins
            else passes(backbone, guide.roles if guide else (), most)
        )
        self.rows = Rows(backbone, parts, stop, watch, guide)

    @torch.no_grad()
    def run(self) -> None:
        logits_NBV, attention_BT = self.prefill()
        while True:
            tokens_B = self.rows.draw(logits_NBV)
            del logits_NBV  # the next pass makes as many
            keep = self.rows.record(tokens_B)
            joining = self.next(self._joining(len(keep)))
            if not keep and not joining:
                break
            logits_NBV, attention_BT = self.rows.advance(keep, tokens_B, attention_BT, joining)
            if self.rows.joins and len(keep) < len(tokens_B):
                attention_BT = self.rows.trimmed(attention_BT)

    def prefill(self) -> tuple[Tensor, Tensor]:
        """Return next-token logits `[N, B, V]` and the attention mask after the prompts of the first rows."""
        return self.rows.read(self.next(self._places))

    def next(self, count: int) -> list[Row]:
        """Take the next waiting requests."""
        return [self._waiting.popleft() for _ in range(count)]

    def _joining(self, alive: int) -> int:
        """Return how many waiting requests join now."""
        free, waiting = self._places - alive, len(self._waiting)
        return min(free, waiting) if not alive or free * _REFILL >= self._places else 0
