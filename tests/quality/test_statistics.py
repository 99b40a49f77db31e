from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest

from golden_numbers import golden
from selfeval.quality import statistics
from selfeval.quality.statistics import (
    Figure,
    bootstrap_interval,
    mcnemar_exact,
    mean_figure,
    paired_difference,
    percentile_interval,
    proportion,
    ratio_of_means,
    spearman,
    spearman_figure,
    wilson_interval,
)


def test_wilson_matches_golden() -> None:
    entry = golden("12_statistics")["wilson"]
    for k, n, expected in zip(entry["inputs"]["k"], entry["inputs"]["n"], entry["expected"]["ci"], strict=True):
        assert wilson_interval(k, n) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_wilson_holds_the_probabilities_that_the_count_does_not_reject() -> None:
    # Its ends are the two p with |k/n − p| = z √(p (1 − p) / n): the definition, before it is solved for p.
    low, high = wilson_interval(30, 40, confidence=0.9)
    for p in (low, high):
        assert abs(30 / 40 - p) == pytest.approx(1.6448536269514722 * math.sqrt(p * (1 - p) / 40), rel=1e-9)
    assert low < 0.75 < high


def test_wilson_of_nothing_knows_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses_impossible_counts(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        wilson_interval(k, n, confidence=confidence)


def test_proportion_is_the_share_with_its_interval() -> None:
    figure = proportion([True] * 7 + [False] * 13)
    # Wilson at 7 of 20: the first row of the golden table.
    assert (figure.value, figure.n) == (0.35, 20)
    assert (figure.ci_low, figure.ci_high) == pytest.approx((0.18119182410108206, 0.5671457233147638), rel=1e-9)


NOTHING = {"value": None, "ci_low": None, "ci_high": None, "n": 0}


def test_no_cases_give_none_and_never_zero() -> None:
    assert proportion([]).as_json() == NOTHING
    assert mean_figure([]).as_json() == NOTHING
    assert ratio_of_means([], [], 0).as_json() == NOTHING
    assert ratio_of_means([1.0, 2.0], [0.0, 0.0], 0) == Figure(None, None, None, 2)


def test_figure_rounds_for_json_only_and_is_frozen() -> None:
    figure = Figure(1 / 3, 0.1234567, 2 / 3, 9)
    assert figure.as_json() == {"value": 0.333333, "ci_low": 0.123457, "ci_high": 0.666667, "n": 9}
    assert figure.value == 1 / 3
    with pytest.raises(FrozenInstanceError):
        figure.n = 10  # type: ignore[misc]


def test_bootstrap_of_given_resamples_matches_golden() -> None:
    entry = golden("12_statistics")["paired_bootstrap"]
    index_RN = np.array(entry["inputs"]["resample_index"])
    means_R = np.array(entry["inputs"]["scores"])[index_RN].mean(-1)
    assert percentile_interval(means_R) == pytest.approx(entry["expected"]["ci_linear"], rel=1e-9)
    a_N, b_N = np.array(entry["inputs"]["system_a"]), np.array(entry["inputs"]["system_b"])
    differences_R = (a_N - b_N)[index_RN].mean(-1)
    assert percentile_interval(differences_R) == pytest.approx(entry["expected"]["diff_ci_linear"], rel=1e-9)


def test_the_bootstrap_of_a_mean_has_the_width_of_its_standard_error() -> None:
    # 400 values of a normal with σ = 3: the interval is mean ± 1.96 · s/√n, up to the noise of 2000 resamples.
    values_N = np.random.default_rng(1).normal(10, 3, size=400)
    figure = mean_figure(values_N.tolist(), seed=2)
    standard_error = values_N.std(ddof=1) / 20
    assert figure.value == pytest.approx(values_N.mean(), rel=1e-12)
    assert figure.ci_low == pytest.approx(values_N.mean() - 1.96 * standard_error, abs=0.25 * standard_error)
    assert figure.ci_high == pytest.approx(values_N.mean() + 1.96 * standard_error, abs=0.25 * standard_error)
    assert figure.n == 400


def test_one_seed_gives_one_interval_whatever_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).exponential(size=50).tolist()
    at_once = mean_figure(values, seed=5)
    monkeypatch.setattr(statistics, "INDICES_PER_CHUNK", 130)
    assert mean_figure(values, seed=5) == at_once
    assert mean_figure(values, seed=6) != at_once


def test_a_ratio_is_bootstrapped_by_whole_cases() -> None:
    # Every case has a = 1.5 b: each resample gives exactly 1.5. Resampling a and b apart would give a wide interval.
    b = [1.0, 50.0, 3.0, 200.0, 7.0]
    figure = ratio_of_means([1.5 * x for x in b], b, 0)
    assert (figure.value, figure.ci_low, figure.ci_high, figure.n) == pytest.approx((1.5, 1.5, 1.5, 5), rel=1e-12)
    # And it is the ratio of the means, not the mean of the ratios (which would be 2.5 here).
    assert ratio_of_means([4.0, 1.0], [1.0, 1.0], 0).value == 2.5
    assert ratio_of_means([4.0, 2.0], [1.0, 2.0], 0).value == 2.0


def test_resamples_without_a_denominator_are_left_out() -> None:
    # One of two cases weighs nothing: 1/4 of the resamples have Σ b = 0; the others give Σ a / Σ b = 2/1 or 2/2.
    figure = ratio_of_means([1.0, 1.0], [1.0, 0.0], 0)
    assert (figure.value, figure.ci_low, figure.ci_high) == (2.0, 1.0, 2.0)
    assert bootstrap_interval(lambda index_RN: np.full(len(index_RN), np.nan), 3) == (None, None)


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_figure([1.0, math.nan])
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        ratio_of_means([1.0, 2.0], [1.0], 0)
    with pytest.raises(ValueError, match="0 cases"):
        bootstrap_interval(lambda index_RN: np.zeros(len(index_RN)), 0)


def test_mcnemar_matches_golden() -> None:
    for row in golden("12_statistics")["mcnemar"]["expected"]["results"]:
        assert mcnemar_exact(row["b"], row["c"]) == pytest.approx(row["exact_p"], rel=1e-9)
        assert mcnemar_exact(row["c"], row["b"]) == pytest.approx(row["exact_p"], rel=1e-9)


@pytest.mark.parametrize(("b", "c"), [(3, 3), (0, 7), (40, 61), (900, 1100)])
def test_mcnemar_is_twice_the_binomial_tail(b: int, c: int) -> None:
    tail = sum(Fraction(math.comb(b + c, i), 2 ** (b + c)) for i in range(min(b, c) + 1))
    assert mcnemar_exact(b, c) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_mcnemar_of_thousands_of_cases_is_near_its_normal_approximation() -> None:
    # p = erfc((|b − c| − 1) / √(2 (b + c))), good to a percent at this size; 2^6100 is no float.
    assert mcnemar_exact(3000, 3100) == pytest.approx(math.erfc(99 / math.sqrt(2 * 6100)), rel=1e-2)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        mcnemar_exact(-1, 2)


@pytest.mark.parametrize("name", ["spearman", "spearman_ties"])
def test_spearman_matches_golden(name: str) -> None:
    entry = golden("12_statistics")[name]
    x, y = entry["inputs"]["x"], entry["inputs"]["y"]
    assert spearman(x, y) == pytest.approx(entry["expected"]["spearman"], abs=1e-9)


def test_spearman_is_undefined_where_nothing_varies() -> None:
    assert spearman([1.0], [2.0]) is None
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman_figure([1.0, 1.0], [1.0, 2.0]) == Figure(None, None, None, 2)


def test_the_interval_of_spearman_holds_its_value_and_narrows() -> None:
    rng = np.random.default_rng(3)
    wide, narrow = ((x, x + rng.normal(size=n)) for n in (40, 1000) for x in [rng.normal(size=n)])
    figures = [spearman_figure(list(x), list(y)) for x, y in (wide, narrow)]
    for figure in figures:
        assert figure.ci_low is not None
        assert figure.ci_high is not None
        assert figure.value is not None
        assert figure.ci_low < figure.value < figure.ci_high
    first, second = ((f.ci_high or 0) - (f.ci_low or 0) for f in figures)
    # The standard error of a correlation r is about (1 - r^2) / sqrt(n): the widths go as sqrt(1000 / 40) = 5.
    assert 3 < first / second < 8


# -- the same cases twice -----------------------------------------------------------------------------------------------


def paired(both: int, gained: int, lost: int, neither: int) -> Figure:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return paired_difference(before, after)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # Newcombe 1998, table III, method 10: the cells (e, f, g, h) and the interval of (f - g) / n.
        ((36, 12, 2, 0), (0.2, 0.0569, 0.3404)),
        # No case changed, half of them right. By hand: phi = (25 * 25 - 50 / 2) / 25^2 = 0.96. Wilson at 25 of 50 is 1/2 +- w,
        # w = z sqrt(1/200 + z^2 / 10000) / (1 + z^2 / 50) = 0.133556, and the reach w sqrt(2 - 2 phi) = 0.282843 w = 0.037775.
        ((25, 0, 0, 25), (0.0, -0.037775, 0.037775)),
        # All right both times: phi is 0, the Wilson interval of 20 of 20 is (0.838875, 1), so x = 0.161125 and y = 0.
        ((20, 0, 0, 0), (0.0, -0.161125, 0.161125)),
    ],
)
def test_a_paired_difference_has_newcombes_interval(counts: tuple[int, ...], expected: tuple[float, ...]) -> None:
    found = paired(*counts)
    assert (found.value, found.ci_low, found.ci_high) == pytest.approx(expected, abs=5e-5)
    assert found.n == sum(counts)


def test_a_paired_difference_turns_with_its_sides() -> None:
    there, back = paired(36, 12, 2, 5), paired(36, 2, 12, 5)
    assert (back.value, back.ci_low, back.ci_high) == pytest.approx((-there.value, -there.ci_high, -there.ci_low), abs=1e-12)  # type: ignore[operator]


def test_pairing_narrows_the_interval_where_the_same_cases_are_right() -> None:
    alike, unlike = paired(80, 10, 0, 10), paired(70, 20, 10, 0)  # 80% before and 90% after in both
    assert alike.value == unlike.value == pytest.approx(0.1)
    assert alike.ci_low > 0 > unlike.ci_low  # type: ignore[operator]


def test_a_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    # 2000 draws of 60 cases: of 95%, four standard errors are 4 sqrt(0.95 * 0.05 / 2000) = 0.0195.
    cells, truth, rng = [0.7, 0.15, 0.05, 0.1], 0.1, np.random.default_rng(0)
    drawn = [paired(*counts) for counts in rng.multinomial(60, cells, size=2000).tolist()]
    covered = np.mean([f.ci_low <= truth <= f.ci_high for f in drawn])  # type: ignore[operator]
    assert covered == pytest.approx(0.95, abs=0.0195)


def test_a_paired_difference_of_nothing_is_none_and_cases_come_in_pairs() -> None:
    assert paired_difference([], []).as_json() == NOTHING
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([True, False], [True])
