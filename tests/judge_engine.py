"""Replace the engine that judges generate with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from selfeval.judging import label_reader, voting
from selfeval.prompt import Prompt
from selfeval.rollout.requests import Request, Rollout

__all__ = ["judges_generate_with"]


def judges_generate_with(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., list[Rollout]]) -> None:
    """Make every prompted judge call `engine` in place of `generate`; nothing else that generates is changed.

    The probabilities of labels are those that it watches at the first of one token.
    """

    def next_logprobs(
        backbone: Any, prompts: Sequence[Prompt], watch: Sequence[int], *, batch_size: int, advance: Any = None
    ) -> list[tuple[float, ...]]:
        requests = [Request(prompt, 0.0) for prompt in prompts]
        found = engine(backbone, requests, max_new_tokens=1, seed=0, batch_size=batch_size, watch=watch)
        return [rollout.watched[0] for rollout in found]

    monkeypatch.setattr(label_reader, "next_logprobs", next_logprobs)
    for module in (label_reader, voting):
        monkeypatch.setattr(module, "generate", engine)
