"""The probability that one reply beats another, from the scores of one evaluator or of an ensemble."""

from __future__ import annotations

import json
import math

import pytest

from selfeval.quality.margin_signals import MarginCalibration
from selfeval.runs.member_scores import MemberScores, disagreement
from selfeval.runs.members import Temperature
from selfeval.runs.pair_confidence import PairConfidence


def test_the_score_of_an_ensemble_is_the_mean_and_a_number_like_any_other() -> None:
    a, b = MemberScores([1.0, 2.0, 6.0]), MemberScores([0.0, 2.0, 1.0])
    assert (a, b) == (3.0, 1.0)
    assert max([b, a]) is a
    assert json.dumps([a]) == "[3.0]"


def test_disagreement_is_the_population_deviation_of_the_margin() -> None:
    a, b = MemberScores([1.0, 2.0, 6.0]), MemberScores([0.0, 2.0, 1.0])
    # Margins 1, 0 and 5: mean 2, variance (1 + 4 + 9) / 3.
    assert disagreement(a, b) == pytest.approx(math.sqrt(14 / 3))
    assert disagreement(b, a) == disagreement(a, b)
    assert disagreement(a, 1.0) == disagreement(3.0, 1.0) == 0.0


def test_the_margin_alone_decides_without_signals() -> None:
    found = PairConfidence(Temperature(2.0, 100))
    a, b = MemberScores([1.0, 5.0]), MemberScores([0.0, 4.0])
    assert found.probability(a, b) == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert found.probability(a, b) + found.probability(b, a) == pytest.approx(1.0)
    assert found.probability(a, a) == 0.5
    assert found.is_calibrated
    assert not PairConfidence(Temperature(1.0, 0)).is_calibrated


def test_members_that_disagree_are_less_sure() -> None:
    signals = MarginCalibration({"choice": 0.0, "margin": 0.5, "disagreement": -1.0})
    found = PairConfidence(Temperature(2.0, 100), signals)
    agreed, b = MemberScores([4.0, 4.0]), MemberScores([0.0, 0.0])
    assert found.probability(agreed, b) == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert found.probability(b, agreed) == pytest.approx(1 / (1 + math.exp(2.0)))
    # The deviation of the margins 3 and 5 is 1.
    assert found.probability(MemberScores([3.0, 5.0]), b) == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert found.probability(MemberScores([-3.0, -5.0]), b) == pytest.approx(1 / (1 + math.exp(1.0)))
    assert found.probability(b, b) == 0.5
