"""All signals of a verdict in one probability: simulated judges whose errors some of the signals announce."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selfeval.quality.calibration import aurc, calibration_error
from selfeval.quality.judge_calibration import Calibration, Looks, fit_to_consistency, fit_to_labels
from selfeval.quality.judge_signals import (
    SIGNALS,
    Shape,
    SignalCalibration,
    fit_signals_to_consistency,
    fit_signals_to_labels,
)
from selfeval.quality.signed_regression import FEWEST_FOR_ISOTONIC

NONE = dict.fromkeys(SIGNALS, 0.0)
SHAPES: tuple[Shape, ...] = ("temperature", "isotonic")


def judged(n: int, seed: int = 0) -> tuple[list[Looks], list[bool]]:
    """Draw looks of a judge that is right with probability 0.95 where its votes agree, and 0.6 where they do not.

    Its log-odds have the same size everywhere, so the margin of a look says nothing.
    """
    rng = np.random.default_rng(seed)
    better_N, split_N2 = rng.random(n) < 0.5, rng.random((n, 2)) < 0.5
    right_N2 = rng.random((n, 2)) < np.where(split_N2, 0.6, 0.95)
    sign_N2 = np.where(right_N2 == better_N[:, None], 1.0, -1.0)
    looks = [Looks(tuple(2.0 * sign), entropies=tuple(0.6 * split)) for sign, split in zip(sign_N2, split_N2, strict=True)]
    return looks, better_N.tolist()


def figures(found: Calibration | SignalCalibration, looks: list[Looks], better: list[bool]) -> tuple[float, float]:
    """Return calibration error and area under the risk-coverage curve."""
    chances = [found.probability(pair) for pair in looks]
    confidence = [max(p, 1 - p) for p in chances]
    credit = [0.5 if p == 0.5 else float((p > 0.5) == label) for p, label in zip(chances, better, strict=True)]
    chosen = [(c, value == 1.0) for c, value in zip(confidence, credit, strict=True) if value != 0.5]
    error, area = calibration_error([c for c, _ in chosen], [right for _, right in chosen]).value, aurc(confidence, credit)
    assert error is not None
    assert area is not None
    return error, area


@pytest.mark.parametrize("shape", SHAPES)
def test_votes_that_disagree_lower_the_probability_without_labels(shape: Shape) -> None:
    looks, _ = judged(600)
    found, slope = fit_signals_to_consistency(looks, shape), fit_to_consistency(looks)
    assert found is not None
    assert slope is not None
    assert found.weights["entropy"] < -0.5
    assert found.weights["disagreement"] == found.weights["truncated"] == 0.0
    others, better = judged(3000, seed=1)
    # A single slope cannot tell a look with split votes from another. The error is that of the lower bound of the agreement,
    # by which both are underconfident.
    error, area = figures(found, others, better)
    assert error < 0.09
    assert area < 0.6 * figures(slope, others, better)[1]
    whole, split = (found.probability(Looks((2.0, 2.0), entropies=(h, h))) for h in (0.0, 0.6))
    # 0.95² / (0.95² + 0.05²) and 0.6² / (0.6² + 0.4²)
    assert (whole, split) == pytest.approx((0.997, 0.692), abs=0.07)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_find_the_same(shape: Shape) -> None:
    looks, labels = judged(600)
    found, slope = fit_signals_to_labels(looks, labels, shape), fit_to_labels(looks, labels)
    assert found is not None
    assert slope is not None
    assert found.weights["entropy"] < -0.5
    others, better = judged(3000, seed=1)
    error, area = figures(found, others, better)
    assert error < 0.03
    assert area < 0.7 * figures(slope, others, better)[1]


def test_the_probability_is_that_of_the_formula() -> None:
    found = SignalCalibration({**NONE, "agreement": 0.5, "margin": 0.25, "entropy": -1.0}, bias=1.0, scale=2.0)
    # y = 3 - 1 and -3 + 1: looks of 0.5 + 0.25 · 2 - 0.1 and 0.5 + 0.25 · 2, for different replies.
    looks = Looks((3.0, -3.0), entropies=(0.1, 0.0))
    assert found.probability(looks) == pytest.approx(1 / (1 + math.exp(2.0 * 0.1)))
    # Never evidence for the other reply: with an entropy of 5 the first look is worth nothing.
    assert found.probability(Looks((3.0, -3.0), entropies=(5.0, 0.0))) == pytest.approx(1 / (1 + math.exp(2.0 * 1.0)))
    steps = ((0.5, 0.6), (1.5, 0.8))
    of_pairs = SignalCalibration({**NONE, "agreement": 0.5}, bias=0.0, steps=steps)
    assert of_pairs.probability(Looks((1.0, 2.0))) == pytest.approx(0.7)
    assert of_pairs.probability(Looks((-1.0, -2.0))) == pytest.approx(0.3)
    assert of_pairs.probability(Looks((1.0, -2.0))) == 0.5
    of_looks = SignalCalibration({**NONE, "agreement": 0.5}, bias=0.0, steps=steps, of="looks")
    assert of_looks.probability(Looks((1.0, 2.0))) == pytest.approx(0.6**2 / (0.6**2 + 0.4**2))


def test_truncation_and_disagreement_are_signals_of_labels() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random(400) < 0.5).tolist()
    doubtful = rng.random(400) < 0.5
    right = rng.random(400) < np.where(doubtful, 0.55, 0.95)
    values = [3.0 if label == is_right else -3.0 for label, is_right in zip(labels, right, strict=True)]
    split = [Looks((v,), disagreement=0.5 * bool(d)) for v, d in zip(values, doubtful, strict=True)]
    cut = [Looks((v,), truncated=bool(d)) for v, d in zip(values, doubtful, strict=True)]
    for looks, signal in ((split, "disagreement"), (cut, "truncated")):
        found = fit_signals_to_labels(looks, labels, "temperature")
        assert found is not None
        assert found.weights[signal] < -0.1
        doubted, sure = looks[doubtful.tolist().index(True)], looks[doubtful.tolist().index(False)]
        sizes = [max(p, 1 - p) for p in map(found.probability, (doubted, sure))]
        assert sizes == pytest.approx([0.55, 0.95], abs=0.06)


def test_a_judge_that_guesses_gets_one_half_and_few_pairs_get_a_temperature() -> None:
    rng = np.random.default_rng(0)
    guesses = [Looks(tuple(x)) for x in rng.normal(size=(200, 2))]
    found = fit_signals_to_consistency(guesses, "isotonic")
    assert found is not None
    assert found.is_useless
    assert found.probability(Looks((5.0, 5.0))) == 0.5
    looks, labels = judged(FEWEST_FOR_ISOTONIC)
    # A pair has two looks, and one label.
    few = FEWEST_FOR_ISOTONIC // 2
    for enough, more in ((few, True), (few - 1, False)):
        fitted = fit_signals_to_consistency(looks[:enough], "isotonic")
        assert fitted is not None
        assert bool(fitted.steps) == more
    fitted = fit_signals_to_consistency(looks, "isotonic", [number // 4 for number in range(len(looks))])
    assert fitted is not None
    assert not fitted.steps  # four pairs of each of 50 questions
    for enough, more in ((FEWEST_FOR_ISOTONIC, True), (FEWEST_FOR_ISOTONIC - 1, False)):
        fitted = fit_signals_to_labels(looks[:enough], labels[:enough], "isotonic")
        assert fitted is not None
        assert bool(fitted.steps) == more
    assert fit_signals_to_consistency(looks[:49], "temperature") is None
    assert fit_signals_to_labels(looks[:49], labels[:49], "temperature") is None
    with pytest.raises(ValueError, match="pairs with two looks"):
        fit_signals_to_consistency([Looks((1.0,))] * 60, "temperature")
    with pytest.raises(ValueError, match="got 60 pairs and 59 labels"):
        fit_signals_to_labels(looks[:60], labels[:59], "temperature")
