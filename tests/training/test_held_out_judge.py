from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import tiny_models
from selfeval.config import VerdictsConfig
from selfeval.judging.judge import Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.training import held_out_judge
from selfeval.training.context import POLICY, JudgeReading
from selfeval.training.held_out_judge import HeldOutJudge


def reading(monkeypatch: pytest.MonkeyPatch, said: Sequence[float | None]) -> JudgeReading | None:
    """Return the judge's reading of these probabilities that the policy's reply is better; None marks an unreadable verdict."""
    backbone = tiny_models.backbone("llama", 384)
    backbone.add_role(POLICY)

    def compare(*_: Any, **__: Any) -> list[Judgement]:
        return [Judgement(p, p, p, None, (None, None), ("", "")) for p in said]

    monkeypatch.setattr(held_out_judge, "compare", compare)
    templates = Templates.load(templates_folder("none"), backbone.loaded.tokenizer)
    questions = [f"What is {i}?" for i in range(len(said))]
    return HeldOutJudge(backbone, templates, VerdictsConfig(), questions, 2, 8, 0)(None)


def test_a_verdict_that_cannot_be_read_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reading(monkeypatch, [1.0, 1.0, 0.0, None])
    assert found is not None
    assert found.win_rate == pytest.approx(2 / 3)  # and not 2.5 of 4
    assert found.unparsed == 0.25
    assert found.error == pytest.approx((2 / 9) ** 0.5 / 3**0.5)


def test_where_most_cannot_be_read_there_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reading(monkeypatch, [1.0, None, None, None]) is None
    assert reading(monkeypatch, [1.0]) is None
