"""Replace the engine that judges generate with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from selfeval.judging import label_reader, voting
from selfeval.rollout.requests import Rollout

__all__ = ["judges_generate_with"]


def judges_generate_with(monkeypatch: pytest.MonkeyPatch, engine: Callable[..., list[Rollout]]) -> None:
    """Make every prompted judge call `engine` in place of `generate`; nothing else that generates is changed."""
    for module in (label_reader, voting):
        monkeypatch.setattr(module, "generate", engine)
