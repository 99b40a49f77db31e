from __future__ import annotations

import math

import numpy as np
import pytest

from golden_numbers import golden
from selfeval.quality.calibration import (
    TEMPERATURE_RANGE,
    aurc,
    brier_score,
    calibration_error,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
    risk_coverage,
)


@pytest.mark.parametrize("name", ["calibration", "calibration_small"])
def test_calibration_matches_golden(name: str) -> None:
    entry = golden("12_statistics")[name]
    prob, label, expected = entry["inputs"]["prob"], entry["inputs"]["label"], entry["expected"]
    for scheme in ("equal_mass", "equal_width"):
        error = expected_calibration_error(prob, label, bins=15, scheme=scheme)
        assert error == pytest.approx(expected[f"ece_{scheme}"], rel=1e-9)
        counts = [n for _, _, n in reliability_bins(prob, label, bins=15, scheme=scheme)]
        assert counts == [n for n in expected[f"bin_counts_{scheme}"] if n]
    gaps = [abs(claim - hit) for claim, hit, _ in reliability_bins(prob, label, bins=15, scheme="equal_width")]
    assert max(gaps) == pytest.approx(expected["mce_equal_width"], rel=1e-9)
    assert brier_score(prob, label) == pytest.approx(expected["brier"], rel=1e-9)


def test_edges_of_equal_width_belong_to_the_lower_bin() -> None:
    # Bins of a fifth: [0, 0.2], (0.2, 0.4], ..., so 0 and 0.2 share the first, 0.6 is in the third, 1 in the last.
    rows = reliability_bins([0.0, 0.2, 0.6, 1.0], [0, 1, 1, 1], bins=5, scheme="equal_width")
    assert rows == [(0.1, 0.5, 2), (0.6, 1.0, 1), (1.0, 1.0, 1)]


def test_equal_mass_gives_the_first_bins_one_more() -> None:
    rows = reliability_bins([0.5, 0.1, 0.9, 0.3, 0.7], [True, False, True, False, True], bins=2)
    # Sorted: .1 .3 .5 | .7 .9
    assert [row[2] for row in rows] == [3, 2]
    assert [row[:2] for row in rows] == [pytest.approx((0.3, 1 / 3)), pytest.approx((0.8, 1.0))]


@pytest.mark.parametrize("name", ["aurc", "aurc_ties"])
def test_risk_coverage_matches_golden(name: str) -> None:
    entry = golden("12_statistics")[name]
    confidence, correct = entry["inputs"]["confidence"], [not error for error in entry["inputs"]["error"]]
    expected, n = entry["expected"], len(correct)
    assert aurc(confidence, correct) == pytest.approx(expected["aurc"], rel=1e-9)
    # One point per case yields the whole curve; a larger `points` changes nothing.
    for points in (n, 5 * n):
        curve = risk_coverage(confidence, correct, points=points)
        assert [coverage for coverage, _ in curve] == pytest.approx([(k + 1) / n for k in range(n)])
        assert [risk for _, risk in curve] == pytest.approx(expected["risk_coverage"], rel=1e-9)
    by_tenths = dict(risk_coverage(confidence, correct, points=10))
    assert by_tenths[math.ceil(0.8 * n) / n] == pytest.approx(expected["risk_at_80"], rel=1e-9)
    assert by_tenths[math.ceil(0.5 * n) / n] == pytest.approx(expected["risk_at_50"], rel=1e-9)


def test_the_most_confident_are_answered_first_and_ties_keep_their_order() -> None:
    # Order by confidence: cases 1, 3 (0.9, right), then 0 (0.5, wrong), 2 (0.1, wrong).
    assert risk_coverage([0.5, 0.9, 0.1, 0.9], [0, 1, 0, 1], points=4) == [
        (0.25, 0),
        (0.5, 0),
        (0.75, 1 / 3),
        (1.0, 0.5),
    ]
    assert aurc([0.5, 0.5], [True, False]) == 0.25  # risks 0 and 1/2
    assert aurc([0.5, 0.5], [False, True]) == 0.75  # risks 1 and 1/2


def test_no_cases_give_none_and_never_zero() -> None:
    assert expected_calibration_error([], []) is None
    assert brier_score([], []) is None
    assert aurc([], []) is None
    assert risk_coverage([], []) == []
    assert reliability_bins([], []) == []


def test_temperature_of_one_logit_size_is_its_log_odds() -> None:
    # All |z| = 4, right in 9 of 12: σ(4/T) = 3/4, so T = 4 / ln 3.
    logits = [4.0] * 6 + [-4.0] * 6
    labels = [1.0] * 4 + [0.0] * 2 + [0.0] * 5 + [1.0]
    assert fit_temperature(logits, labels) == pytest.approx(4 / math.log(3), rel=1e-9)


def test_temperature_recovers_what_scaled_the_logits_and_takes_soft_labels() -> None:
    true_logits = np.random.default_rng(0).normal(0, 2, size=300)
    soft = 1 / (1 + np.exp(-true_logits))
    # With the true probabilities as labels the optimum is exact: the logits were multiplied by 2.5.
    assert fit_temperature((2.5 * true_logits).tolist(), soft.tolist()) == pytest.approx(2.5, rel=1e-9)
    assert fit_temperature((0.4 * true_logits).tolist(), soft.tolist()) == pytest.approx(0.4, rel=1e-9)


def test_temperature_is_the_best_of_a_fine_grid() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, size=80)
    labels = (rng.random(80) < 1 / (1 + np.exp(-logits / 2))).astype(float)
    losses = {t: np.sum(np.logaddexp(0, logits / t) - labels * logits / t) for t in np.geomspace(0.2, 20, 2000)}
    assert fit_temperature(logits.tolist(), labels.tolist()) == pytest.approx(min(losses, key=losses.__getitem__), rel=3e-3)


def test_a_prior_holds_the_temperature_of_few_labels() -> None:
    # Ten separable pairs collapsed to 0.032: "confidence 1.00" in everything.
    logits, labels = [0.1 * k for k in range(1, 11)], [1.0] * 10
    assert fit_temperature(logits, labels) == pytest.approx(TEMPERATURE_RANGE[0])
    held = fit_temperature(logits, labels, prior=0.5)
    assert 0.25 < held < 0.6
    losses = {
        t: np.logaddexp(0, -np.array(logits) / t).sum() + 2 * math.log(t) ** 2 for t in np.geomspace(0.01, 100, 20_000).tolist()
    }
    assert held == pytest.approx(min(losses, key=losses.__getitem__), rel=1e-3)


def test_many_labels_outweigh_the_prior() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, size=5000)
    labels = (rng.random(5000) < 1 / (1 + np.exp(-logits / 2))).astype(float)
    free, held = (fit_temperature(logits.tolist(), labels.tolist(), prior=prior) for prior in (None, 0.5))
    assert held == pytest.approx(free, rel=0.01)
    with pytest.raises(ValueError, match="must be positive"):
        fit_temperature([1.0], [1.0], prior=0.0)


def test_temperature_stays_in_its_range() -> None:
    assert fit_temperature([1.0, -1.0], [1, 0]) == pytest.approx(TEMPERATURE_RANGE[0])  # separable: wants T -> 0
    assert fit_temperature([1.0, -1.0], [0, 1]) == pytest.approx(TEMPERATURE_RANGE[1])  # inverted: wants T -> infinity
    assert fit_temperature([0.0, 0.0], [1, 0]) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        fit_temperature([], [])


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        brier_score([0.5, 0.5], [1])
    with pytest.raises(ValueError, match="a confidence must be in"):
        brier_score([1.5], [1])
    with pytest.raises(ValueError, match="an outcome must be in"):
        aurc([0.5], [math.nan])
    with pytest.raises(ValueError, match="finite"):
        fit_temperature([math.inf], [1])
    with pytest.raises(ValueError, match="bins"):
        reliability_bins([0.5], [1], bins=0)
    with pytest.raises(ValueError, match="points"):
        risk_coverage([0.5], [1], points=0)
    with pytest.raises(ValueError, match="equal_mass"):
        expected_calibration_error([0.5], [1], scheme="adaptive")  # type: ignore[arg-type]


# -- the calibration error without its bias -----------------------------------------------------------------------------


def test_a_calibrated_model_has_a_calibration_error_of_zero() -> None:
    found = calibration_error([0.75] * 40, [True] * 30 + [False] * 10)
    assert (found.value, found.ci_low, found.n) == (0.0, 0.0, 40)
    assert found.ci_high is not None
    assert 0.05 < found.ci_high < 0.25
    # Sure and right a hundred times: 3.6 errors of 100 would stay unseen in 2.5% of draws (0.975 = 1 - (1 - e)^100).
    sure = calibration_error([1.0] * 100, [True] * 100)
    assert (sure.value, sure.ci_low) == (0.0, 0.0)
    assert sure.ci_high == pytest.approx(1 - 0.025 ** (1 / 100), abs=0.01)


def test_a_large_calibration_error_is_found() -> None:
    # Claims 0.9 and is right half the time: 0.4 too sure, with a standard error of sqrt(0.25 / 400) = 0.025.
    found = calibration_error([0.9] * 400, [True, False] * 200)
    assert found.value == pytest.approx(0.4, abs=0.01)
    assert found.ci_low == pytest.approx(0.35, abs=0.015)
    assert found.ci_high == pytest.approx(0.45, abs=0.015)
    assert calibration_error([0.9] * 400, [True, False] * 200) == found


def test_a_calibration_error_of_few_cases_stays_within_zero_and_one() -> None:
    for confidence, correct in (([1.0], [True]), ([1.0, 1.0, 1.0], [True, False, False]), ([0.5], [False]), ([0.0], [True])):
        found = calibration_error(confidence, correct)
        assert found.value is not None
        assert found.ci_low is not None
        assert found.ci_high is not None
        assert 0.0 <= found.ci_low <= found.value <= found.ci_high <= 1.0
        assert found.ci_high - found.ci_low > 0.3
    assert calibration_error([], []).as_json() == {"value": None, "ci_low": None, "ci_high": None, "n": 0}
    with pytest.raises(ValueError, match=r"got 0\.5 at position 0"):
        calibration_error([0.5], [0.5])  # type: ignore[list-item]
