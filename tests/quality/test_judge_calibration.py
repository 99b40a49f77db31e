"""Calibration of a judge: simulated judges whose accuracy and position bias are known."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

from selfeval.quality.calibration import calibration_error
from selfeval.quality.judge_calibration import (
    FEWEST_PAIRS,
    Calibration,
    Looks,
    agreement_accuracy,
    fit_to_consistency,
    fit_to_labels,
    log_odds,
)

Simulated = tuple[list[Looks], list[bool]]


def judged(
    n: int, *, signal: float, bias: float = 0.0, sharpness: float = 1.0, shared: float = 0.0, cut: float = 0.0, seed: int = 0
) -> Simulated:
    """Draw pairs and the looks of a judge. Each order sees the true preference, ±1, with normal noise of variance 1.

    Args:
        signal: size of the preference relative to the noise; 0 is a judge that guesses.
        bias: added to the log-odds of the reply shown first.
        sharpness: factor of the log-odds; above 1 the judge is overconfident.
        shared: share of the variance of the noise that both orders have in common.
        cut: share of the pairs whose outputs were cut off, and whose looks are noise alone.
    """
    rng = np.random.default_rng(seed)
    better_N = rng.random(n) < 0.5
    cut_N = rng.random(n) < cut
    noise_N2 = math.sqrt(shared) * rng.normal(size=(n, 1)) + math.sqrt(1 - shared) * rng.normal(size=(n, 2))
    sign_N = np.where(cut_N, 0.0, np.where(better_N, 1.0, -1.0))
    # The log-odds of a normal observation x of ±signal with variance 1 are 2 · signal · x.
    x_N2 = sharpness * 2 * signal * (signal * sign_N[:, None] + noise_N2) if signal else sharpness * noise_N2
    looks = [Looks((first + bias, second - bias), bool(c)) for (first, second), c in zip(x_N2, cut_N, strict=True)]
    return looks, better_N.tolist()


def error_of(found: Calibration, pairs: list[Looks], better: list[bool]) -> float:
    chosen = [(found.probability(pair), label) for pair, label in zip(pairs, better, strict=True)]
    confidence = [max(p, 1 - p) for p, _ in chosen]
    value = calibration_error(confidence, [(p > 0.5) == label for p, label in chosen]).value
    assert value is not None
    return value


@pytest.mark.parametrize(("signal", "sharpness", "bias"), [(0.6, 4.0, 0.0), (1.0, 1.0, 3.0), (1.5, 0.25, -1.0)])
def test_independent_looks_are_calibrated_without_labels(signal: float, sharpness: float, bias: float) -> None:
    found = fit_to_consistency(judged(4000, signal=signal, bias=bias, sharpness=sharpness, seed=1)[0])
    assert found is not None
    assert found.bias == pytest.approx(bias, abs=0.1 * sharpness)
    # The true slope is 1 / sharpness; a lower bound of the agreement gives less.
    assert 0.8 < found.slope * sharpness < 1.0
    # Judged with other pairs.
    assert error_of(found, *judged(4000, signal=signal, bias=bias, sharpness=sharpness, seed=2)) < 0.02


def test_labels_calibrate_looks_that_share_their_mistakes() -> None:
    pairs, better = judged(4000, signal=0.7, sharpness=3.0, shared=0.8, seed=3)
    others, labels = judged(4000, signal=0.7, sharpness=3.0, shared=0.8, seed=4)
    consistent, labelled = fit_to_consistency(pairs), fit_to_labels(pairs, better)
    assert consistent is not None
    assert labelled is not None
    assert error_of(labelled, others, labels) < 0.02
    # Shared mistakes cannot be seen in the agreement of the orders.
    assert error_of(consistent, others, labels) > 0.1


def test_a_judge_that_guesses_is_sure_of_nothing() -> None:
    kept = []
    for seed in range(200):
        pairs, _ = judged(256, signal=0.0, bias=2.0, sharpness=5.0, seed=seed)
        found = fit_to_consistency(pairs)
        assert found is not None
        kept += [max(p, 1 - p) >= 0.8 for p in map(found.probability, pairs)]
    # In 2.5 % of the draws its orders agree more often than chance explains.
    assert fmean(kept) < 0.01


def test_a_judge_that_always_chooses_the_first_shown_is_sure_of_nothing() -> None:
    found = fit_to_consistency([Looks((4.0, -4.0))] * 100)
    assert found is not None
    assert found.probability(Looks((4.0, -4.0))) == 0.5


def test_a_position_bias_does_not_hide_the_preference() -> None:
    pairs, better = judged(400, signal=1.5, bias=6.0, seed=5)
    found = fit_to_consistency(pairs)
    assert found is not None
    # Nearly every order chooses the reply shown first, so the mean of both probabilities is close to one half.
    assert fmean(pair.values[0] > 0 > pair.values[1] for pair in pairs) > 0.7
    right = [(found.probability(pair) > 0.5) == label for pair, label in zip(pairs, better, strict=True)]
    assert fmean(right) > 0.95


def test_verdicts_that_were_cut_off_are_worth_what_they_show() -> None:
    pairs, better = judged(1000, signal=1.5, sharpness=2.0, cut=0.5, seed=6)
    consistent, labelled = fit_to_consistency(pairs), fit_to_labels(pairs, better)
    assert consistent is not None
    assert labelled is not None
    # Cut off, the looks of this judge are noise.
    assert consistent.truncated_slope == 0.0 < 0.3 < consistent.slope
    assert labelled.truncated_slope < 0.2 < 0.4 < labelled.slope
    # Too few of them to measure: they get the slope of all.
    few = fit_to_consistency([pair for pair in pairs if not pair.truncated] + [p for p in pairs if p.truncated][:10])
    assert few is not None
    assert few.truncated_slope == pytest.approx(few.slope, rel=0.1)


def test_exchanging_the_replies_exchanges_their_probabilities() -> None:
    found = Calibration(0.4, 0.1, bias=1.3)
    for first, second in [(2.0, -1.0), (0.3, 0.2), (-5.0, 4.0)]:
        for truncated in (False, True):
            one, other = Looks((first, second), truncated), Looks((-second, -first), truncated)
            assert found.probability(one) == pytest.approx(1 - found.probability(other))
    assert found.probability(Looks((1.0,))) == pytest.approx(1 / (1 + math.exp(-0.4)))
    assert found.probability(Looks((1.0,), truncated=True)) == pytest.approx(1 / (1 + math.exp(-0.1)))


def test_labels_that_are_never_wrong_do_not_make_it_certain() -> None:
    found = fit_to_labels([Looks((1.0,))] * 30 + [Looks((-1.0,))] * 30, [True] * 30 + [False] * 30)
    assert found is not None
    assert 1.0 < found.slope < 5.0  # without a prior, the largest that is allowed


def test_too_few_pairs_fit_nothing() -> None:
    pairs, better = judged(FEWEST_PAIRS - 1, signal=1.0)
    assert fit_to_consistency(pairs) is None
    assert fit_to_labels(pairs, better) is None
    with pytest.raises(ValueError, match="every pair needs a label"):
        fit_to_labels(pairs, better[1:])
    with pytest.raises(ValueError, match="two looks"):
        fit_to_consistency([Looks((1.0,))] * 60)


def test_the_accuracy_of_looks_that_agree() -> None:
    assert [agreement_accuracy(c) for c in (0.3, 0.5, 0.68, 1.0)] == [0.5, 0.5, 0.8, 1.0]
    assert [log_odds(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([-math.log(9999), 0.0, math.log(9999)])
