from __future__ import annotations

import itertools
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
    clustered_mean,
    mcnemar_exact,
    mean_figure,
    paired_difference,
    percentile_interval,
    proportion,
    ratio_of_means,
    spearman,
    spearman_figure,
    student_quantile,
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
    assert ratio_of_means([], []).as_json() == NOTHING
    assert ratio_of_means([1.0, 2.0], [0.0, 0.0]) == Figure(None, None, None, 2)


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


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # The 97.5 % column of Student's table, e.g. Abramowitz and Stegun 1964, table 26.10.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_student_quantiles_are_those_of_the_table(degrees: int, expected: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(expected, abs=5e-4)
    assert student_quantile(0.025, degrees) == -student_quantile(0.975, degrees)


def test_student_quantiles_agree_where_series_and_expansion_meet_and_end_at_the_normal() -> None:
    quantiles = [student_quantile(0.975, degrees) for degrees in (199, 200, 201, 202)]
    steps = [a - b for a, b in itertools.pairwise(quantiles)]
    assert steps == pytest.approx([steps[0]] * 3, rel=0.02)  # no jump between 200 and 201
    assert student_quantile(0.975, 10**9) == pytest.approx(1.9599639845, abs=1e-8)
    with pytest.raises(ValueError, match="at least one degree"):
        student_quantile(0.975, 0)


def test_a_mean_without_bounds_has_students_interval() -> None:
    # 1, 2, 3, 4: mean 2.5, s = sqrt(5 / 3), t_3 = 3.182446, so 2.5 +- 3.182446 * 1.290994 / 2.
    figure = mean_figure([1.0, 2.0, 3.0, 4.0], bounds=None)
    reach = 3.182446 * math.sqrt(5 / 3) / 2
    assert (figure.value, figure.ci_low, figure.ci_high) == pytest.approx((2.5, 2.5 - reach, 2.5 + reach), rel=1e-6)


def test_equal_values_without_bounds_have_no_interval() -> None:
    # Wilson's interval of 0 of 6 is (0, 0.39): an invention for nats or tokens.
    for values in ([0.0] * 6, [1.0] * 6, [7.3] * 6, [7.3]):
        assert mean_figure(values, bounds=None) == Figure(pytest.approx(values[0]), None, None, len(values))


def test_a_mean_within_bounds_has_the_adjusted_interval() -> None:
    # 1, 1, 1, 0.5 and the bounds 0 and 1: mean 0.75, s^2 = (4.25 - 6 * 0.5625) / 5 = 0.175; t_5 = 2.570582.
    figure = mean_figure([1.0, 1.0, 1.0, 0.5])
    assert (figure.value, figure.ci_high, figure.n) == (0.875, 1.0, 4)
    assert figure.ci_low == pytest.approx(0.75 - 2.570582 * math.sqrt(0.175 / 6), abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 6, 50, 2000])
def test_equal_scores_are_no_proof_of_equality(value: float, n: int) -> None:
    figure = mean_figure([value] * n)
    assert figure.ci_low is not None
    assert figure.ci_high is not None
    assert 0 <= figure.ci_low <= value <= figure.ci_high <= 1
    assert figure.ci_high - figure.ci_low > 1 / (n + 2)


def test_values_outside_of_the_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values must be in \[0.0, 1.0\], got 0.5 to 1.5"):
        mean_figure([0.5, 1.5])
    assert mean_figure([-1.0, 1.0], bounds=(-1.0, 1.0)).value == 0.0


def test_one_seed_gives_one_interval_whatever_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values_N = np.random.default_rng(3).exponential(size=50)

    def interval(seed: int) -> tuple[float | None, float | None]:
        return bootstrap_interval(lambda index_RN: values_N[index_RN].mean(-1), 50, seed=seed)

    at_once = interval(5)
    monkeypatch.setattr(statistics, "INDICES_PER_CHUNK", 130)
    assert interval(5) == at_once
    assert interval(6) != at_once


def test_a_ratio_takes_what_its_two_sides_share_out() -> None:
    # Sums 9 and 6: r = 1.5; residuals a - 1.5 b are 0.5, 0, -0.5 (so s = 0.5), mean b = 2, t_2 = 4.302653.
    figure = ratio_of_means([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    reach = 4.302653 * 0.5 / math.sqrt(3) / 2
    assert (figure.value, figure.ci_low, figure.ci_high, figure.n) == pytest.approx(
        (1.5, 1.5 - reach, 1.5 + reach, 3), rel=1e-6
    )
    # It is the ratio of the means, not the mean of the ratios (which would be 2.5 here).
    assert ratio_of_means([4.0, 1.0], [1.0, 1.0]).value == 2.5
    assert ratio_of_means([4.0, 2.0], [1.0, 2.0]).value == 2.0


def test_one_ratio_in_all_cases_has_no_interval() -> None:
    b = [1.0, 50.0, 3.0, 200.0, 7.0]
    assert ratio_of_means([1.5 * x for x in b], b) == Figure(pytest.approx(1.5), None, None, 5)
    assert ratio_of_means([3.0], [2.0]) == Figure(1.5, None, None, 1)


def test_clusters_are_the_cases() -> None:
    # Two questions with two replies each, alike within a question: as good as two cases, 0 and 1. Sums 2, 0 over counts 2, 2:
    # r = 0.5, residuals 1 and -1, s = sqrt(2), error sqrt(2) / sqrt(2) / 2 = 0.5, t_1 = 12.706205.
    figure = clustered_mean([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert (figure.value, figure.n) == (0.5, 2)
    assert (figure.ci_low, figure.ci_high) == pytest.approx((0.5 - 12.706205 * 0.5, 0.5 + 12.706205 * 0.5), rel=1e-6)
    assert clustered_mean([1.0, 0.0], ["a", "a"]) == Figure(0.5, None, None, 1)
    assert clustered_mean([1.0, 1.0, 0.0, 1.0], "aabc").value == 0.75  # over replies, not over questions (2/3)
    assert clustered_mean([], []).as_json() == NOTHING
    with pytest.raises(ValueError, match="2 values and 1 clusters"):
        clustered_mean([1.0, 2.0], ["a"])


def test_a_bootstrap_that_is_never_defined_has_no_interval() -> None:
    assert bootstrap_interval(lambda index_RN: np.full(len(index_RN), np.nan), 3) == (None, None)


@pytest.mark.parametrize("value", [None, 0.5, 1, 0, "yes", math.nan])
def test_what_is_no_boolean_is_not_counted(value: object) -> None:
    # bool(None) is False and bool(0.5) is True: an unknown outcome would count as a no, and half a credit as a yes.
    outcomes: list[bool] = [True, value, False]  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"must be True or False, got .* at position 1"):
        proportion(outcomes)
    with pytest.raises(ValueError, match=r"before must be True or False, got .* at position 1"):
        paired_difference(outcomes, [True] * 3)
    with pytest.raises(ValueError, match=r"after must be True or False, got .* at position 1"):
        paired_difference([True] * 3, outcomes)


def test_booleans_of_numpy_are_booleans() -> None:
    assert proportion(list(np.array([True, False]))).value == 0.5


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_figure([1.0, math.nan])
    with pytest.raises(ValueError, match="2 numerators and 1 denominators"):
        ratio_of_means([1.0, 2.0], [1.0])
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


def test_spearman_has_bonett_and_wrights_interval_from_ten_cases_on() -> None:
    # r = 0.5, n = 28: atanh r = 0.549306, standard error sqrt((1 + 0.125) / 25) = 0.212132, times 1.959964: 0.415772.
    x = np.random.default_rng(0).normal(size=28)
    figure = spearman_figure(list(x), list(x))
    assert (figure.value, figure.ci_high) == (1.0, 1.0)
    assert figure.ci_low == pytest.approx(math.tanh(math.atanh(1 - 1 / 784) - 1.959964 * math.sqrt(1.5 / 25)), abs=1e-6)
    near = spearman_figure(list(x), list(x + np.random.default_rng(1).normal(size=28)))
    assert near.value is not None
    shift = 1.959964 * math.sqrt((1 + near.value**2 / 2) / 25)
    assert (near.ci_low, near.ci_high) == pytest.approx(
        tuple(math.tanh(math.atanh(near.value * (1 - 1 / 784)) + way * shift) for way in (-1, 1)), abs=1e-6
    )


@pytest.mark.parametrize("n", [2, 3, 9])
def test_few_ranks_are_always_near_a_perfect_order(n: int) -> None:
    rising = [float(i) for i in range(n)]
    assert spearman_figure(rising, rising) == Figure(pytest.approx(1.0), None, None, n)


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
