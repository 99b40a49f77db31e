from __future__ import annotations

import statistics

import pytest

import tiny_models
from policies import PROMPTS
from selfeval.backbone.roles import Backbone
from selfeval.errors import LoopError
from selfeval.rollout.requests import Rollout
from selfeval.training.context import Samples
from selfeval.training.evaluator import score_replies
from selfeval.training.scoring import EvaluatorScorer, Member

SAMPLES = Samples(PROMPTS, [Rollout((10 + i, 3, 20 - i, 1), (0.0,) * 4, True) for i in range(len(PROMPTS))])
MEMBERS = [Member("evaluator-0", 0.5, 2.0), Member("evaluator-1", -1.0, 0.25), Member("evaluator-2")]


def ensemble() -> tuple[Backbone, list[list[float]]]:
    """Three evaluators, and each one's scores of the samples from a separate pass, in its own units."""
    backbone, rows = tiny_models.backbone("llama", eos=(1,)), []
    for number, member in enumerate(MEMBERS):
        backbone.roles.add(member.role, seed=number, head=True, trainable=False)
        tiny_models.scramble(backbone, member.role, seed=number, size=0.05)
        raw = score_replies(backbone, member.role, [p.grade for p in PROMPTS], [r.ids for r in SAMPLES.rollouts], 64)
        rows.append([(score - member.mean) / member.deviation for score in raw])
    return backbone, rows


def test_members_are_combined_in_their_own_units() -> None:
    backbone, rows = ensemble()
    columns = list(zip(*rows, strict=True))
    expected = {
        "mean": [statistics.fmean(c) for c in columns],
        "worst": [min(c) for c in columns],
        "uncertainty": [statistics.fmean(c) - 0.3 * statistics.pvariance(c) for c in columns],
    }
    assert len({tuple(round(x, 3) for x in row) for row in expected.values()}) == 3
    for pessimism, values in expected.items():
        scores = EvaluatorScorer(backbone, 100, MEMBERS, pessimism, weight=0.3)(SAMPLES)  # type: ignore[arg-type]
        assert scores.whole_B.tolist() == pytest.approx(values, abs=1e-4)


def test_one_evaluator_says_its_raw_score() -> None:
    backbone, rows = ensemble()
    scores = EvaluatorScorer(backbone, 100, MEMBERS[2:])(SAMPLES)
    assert scores.whole_B.tolist() == pytest.approx(rows[2], abs=1e-5)


def test_a_member_without_the_reference_needs_a_prompt_without_it() -> None:
    backbone, _ = ensemble()
    with pytest.raises(LoopError, match="no version without one"):
        EvaluatorScorer(backbone, 100, [Member("evaluator-2", reference_answer=False)])(SAMPLES)


def test_the_thinking_is_not_scored() -> None:
    backbone, _ = ensemble()
    scorer = EvaluatorScorer(backbone, 100, MEMBERS[:1])
    thought = [Rollout((30, 31, 32, *r.ids), (0.0,) * 7, True, hidden=3) for r in SAMPLES.rollouts]
    wanted = scorer(SAMPLES).whole_B.tolist()
    assert scorer(Samples(PROMPTS, thought)).whole_B.tolist() == pytest.approx(wanted, abs=1e-5)
