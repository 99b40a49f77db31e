from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from evidence_records import KEPT, QUESTIONS, UNSURE, reply
from selfeval.config import VerdictsConfig
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.records import VerdictState
from selfeval.stages.shards import Batch, ModelHandle
from selfeval.stages.verdicts import JudgePairs


@dataclass(frozen=True)
class Judged(JudgePairs):
    """The work of the stage, with the probability that a judge would give each pair."""

    probability: float = 0.5

    def _judge(self, model: ModelHandle, comparisons: Sequence[Comparison]) -> list[Judgement]:
        return [Judgement(self.probability) for _ in comparisons]


def test_the_judge_is_informed_of_replies_that_the_limit_cut_off() -> None:
    seen: list[Comparison] = []

    @dataclass(frozen=True)
    class Seen(JudgePairs):
        def _judge(self, model: ModelHandle, comparisons: Sequence[Comparison]) -> list[Judgement]:
            seen.extend(comparisons)
            return [Judgement(0.5) for _ in comparisons]

    batch: Batch[Any] = Batch(0, [(QUESTIONS["q1"], reply("q1-r0", "1"), replace(reply("q1-r1", "7"), finished=False))])
    Seen(VerdictsConfig(), 8, 0)(object(), batch)  # type: ignore[arg-type]
    assert seen == [Comparison(QUESTIONS["q1"].text, "1", "7", first_cut=False, second_cut=True)]


@pytest.mark.parametrize(
    ("keep", "probability", "written", "state"),
    [(0.5, 0.4999999999, 0.5, UNSURE), (0.8, 0.7999999999, 0.8, KEPT), (0.8, 0.799999, 0.799999, UNSURE)],
)
def test_the_state_of_a_verdict_follows_from_its_written_probability(
    keep: float, probability: float, written: float, state: VerdictState
) -> None:
    work, model = Judged(VerdictsConfig(keep=keep), 8, 0, probability=probability), object()
    batch: Batch[Any] = Batch(0, [(QUESTIONS["q1"], reply("q1-r0", "1"), reply("q1-r1", "7"))])
    (found,) = work(model, batch).records  # type: ignore[arg-type]
    assert (found.probability, found.state) == (written, state)
