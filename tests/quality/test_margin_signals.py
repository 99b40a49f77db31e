"""The confidence of margin and disagreement: simulated ensembles whose disagreement announces their errors, or does not."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from selfeval.quality.calibration import aurc
from selfeval.quality.margin_signals import MARGIN_SIGNALS, MarginCalibration, fit_margin_signals


def ensemble(n: int, seed: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Draw margins of size 2, right with probability 0.97 where the members agree, and 0.6 where they do not."""
    rng = np.random.default_rng(seed)
    apart_N, first_N = rng.random(n) < 0.5, rng.random(n) < 0.5
    right_N = rng.random(n) < np.where(apart_N, 0.6, 0.97)
    margin_N = np.where(right_N == first_N, 2.0, -2.0)
    return margin_N.tolist(), np.where(apart_N, 1.5, 0.5).tolist(), first_N.astype(float).tolist()


@pytest.mark.parametrize("shape", ["temperature", "isotonic"])
def test_members_that_disagree_are_less_sure(shape: str) -> None:
    found = fit_margin_signals(*ensemble(600), shape, prior=0.5)  # type: ignore[arg-type]
    assert found.weights["disagreement"] < -0.5
    assert bool(found.steps) == (shape == "isotonic")
    assert found.confidence(2.0, 0.5) == pytest.approx(0.97, abs=0.03)
    assert found.confidence(-2.0, 1.5) == pytest.approx(0.6, abs=0.06)
    assert found.confidence(0.0, 1.5) == 0.5
    margins, apart, first = ensemble(3000, seed=1)
    credit = [float((margin > 0) == bool(label)) for margin, label in zip(margins, first, strict=True)]
    area = aurc([found.confidence(m, d) for m, d in zip(margins, apart, strict=True)], credit)
    # All margins have the same size, so the margin alone selects at random.
    assert area is not None
    assert area < 0.6 * (1 - fmean(credit))


def test_a_single_evaluator_has_the_confidence_of_its_margin() -> None:
    rng = np.random.default_rng(0)
    first_N = rng.random(3000) < 0.5
    margin_N = np.where(first_N, 1.0, -1.0) + rng.normal(size=3000)
    found = fit_margin_signals(margin_N.tolist(), [0.0] * 3000, first_N.astype(float).tolist(), "temperature", prior=0.5)
    assert found.weights["disagreement"] == 0.0
    # The log-odds of a normal observation x of 1 or -1 with variance 1 are 2 x.
    assert found.confidence(1.0, 0.0) == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.02)


def test_few_pairs_get_a_temperature_and_no_confidence_is_below_one_half() -> None:
    margins, apart, first = ensemble(199)
    assert not fit_margin_signals(margins, apart, first, "isotonic", prior=0.5).steps
    margins, apart, first = ensemble(400)
    # Two pairs of each question are no more cases than one.
    twins = [number // 2 for number in range(400)]
    assert fit_margin_signals(margins, apart, first, "isotonic", prior=0.5, groups=twins).steps
    assert not fit_margin_signals(margins[2:], apart[2:], first[2:], "isotonic", prior=0.5, groups=twins[2:]).steps
    worst = MarginCalibration(dict.fromkeys(MARGIN_SIGNALS, -1.0))
    assert worst.confidence(3.0, 1.0) == 0.5
    with pytest.raises(ValueError, match="got 0 cases"):
        fit_margin_signals([], [], [], "temperature", prior=0.5)
