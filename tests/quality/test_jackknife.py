from __future__ import annotations

import numpy as np
import pytest

from selfeval.quality.jackknife import FEWEST_CASES, Kept, jackknife
from selfeval.quality.ngram_counts import count_ngrams, distinct_share
from selfeval.quality.statistics import student_quantile
from selfeval.quality.vendi import vendi_score


def test_of_a_mean_it_is_students_interval() -> None:
    # Without case i the mean is (n m - x_i) / (n - 1), so the sum of squares is that of the cases over (n - 1)².
    values_N = np.random.default_rng(0).normal(size=40)
    [found] = jackknife(lambda kept: [values_N[kept].mean()], 40)
    reach = student_quantile(0.975, 39) * values_N.std(ddof=1) / np.sqrt(40)
    assert found.value == pytest.approx(values_N.mean())
    assert found.ci_low == pytest.approx(values_N.mean() - reach)
    assert found.ci_high == pytest.approx(values_N.mean() + reach)
    assert found.n == 40


@pytest.mark.parametrize("n", [400, 407])
def test_with_many_cases_it_is_that_of_the_means_of_equal_groups(n: int) -> None:
    # 20 groups of 20, and at n = 407 seven cases in no group. The variance of a mean of 20 is estimated by that of the group
    # means, so that of a mean of n is 20 / n times as large.
    values_N = np.random.default_rng(0).normal(size=n)
    [found] = jackknife(lambda kept: [values_N[kept].mean()], n)
    means_G = values_N[:400].reshape(20, 20).mean(axis=0)
    reach = student_quantile(0.975, 19) * means_G.std(ddof=1) * np.sqrt(20 / n)
    assert found.ci_low == pytest.approx(values_N.mean() - reach)
    assert found.ci_high == pytest.approx(values_N.mean() + reach)


@pytest.mark.parametrize("n", [30, 45, 110, 199, 210, 333])
def test_a_statistic_of_the_number_of_cases_has_no_width(n: int) -> None:
    [found] = jackknife(lambda kept: [float(kept.sum())], n)
    assert (found.ci_low, found.ci_high) == (n, n)


@pytest.mark.parametrize("n", [30, 45, 110])
def test_orthogonal_vectors_have_a_vendi_score_without_doubt(n: int) -> None:
    axes = np.eye(n, dtype=np.float32)
    [found] = jackknife(lambda kept: [vendi_score(axes[kept]) or 0.0], n)
    assert (found.value, found.ci_low, found.ci_high) == tuple(pytest.approx(n, abs=1e-6) for _ in range(3))


def test_an_interval_stays_in_its_range() -> None:
    values_N = np.array([1.0] * 10 + [0.0])
    [plain] = jackknife(lambda kept: [values_N[kept].mean()], 11)
    [clipped] = jackknife(lambda kept: [values_N[kept].mean()], 11, bounds=[(0.0, 1.0)])
    assert plain.ci_high is not None
    assert plain.ci_high > 1
    assert (clipped.ci_low, clipped.ci_high) == (plain.ci_low, 1.0)
    assert type(plain.value) is float, "not a number of numpy"


def test_a_difference_of_two_measures_on_the_same_cases_has_the_paired_interval() -> None:
    noise_N = np.random.default_rng(1).normal(size=200)

    def statistics(kept: Kept) -> list[float]:
        first, second = noise_N[kept].mean(), (noise_N[kept] + 1).mean()
        return [first, second, second - first]

    before, _, change = jackknife(statistics, 200)
    assert change.value == pytest.approx(1.0)
    assert change.ci_low == pytest.approx(1.0)
    assert before.ci_high is not None
    assert before.ci_low is not None
    assert before.ci_high - before.ci_low > 0.2


def test_few_cases_and_undefined_statistics_have_no_interval() -> None:
    few = jackknife(lambda kept: [float(kept.sum())], FEWEST_CASES - 1)[0]
    assert (few.value, few.ci_low, few.n) == (9.0, None, 9)
    assert jackknife(lambda kept: [float("nan")], 20)[0].value is None
    partly = jackknife(lambda kept: [1.0 if kept[0] else float("nan")], 20)[0]
    assert (partly.value, partly.ci_low) == (1.0, None)
    with pytest.raises(ValueError, match="needs 2 to 200 groups, got 1"):
        jackknife(lambda kept: [1.0], 20, groups=1)


def test_the_interval_of_distinct_2_holds_its_expected_value() -> None:
    """Words with Zipf's frequencies, as in a domain with templates; the interval must be neither empty nor far too wide."""
    generator = np.random.default_rng(2)
    weights = 1 / np.arange(1, 41)

    def collection() -> list[str]:
        words = generator.choice(40, size=(60, 8), p=weights / weights.sum())
        return [" ".join(f"w{word}" for word in row) for row in words]

    def measured(texts: list[str]) -> list[float]:
        counts = count_ngrams(texts, orders=2)
        figure = jackknife(lambda kept: [distinct_share(counts, 2, kept)], 60)[0]
        assert figure.ci_low is not None
        assert figure.ci_high is not None
        return [figure.known, figure.ci_low, figure.ci_high]

    rows = np.array([measured(collection()) for _ in range(150)])
    expected, spread = rows[:, 0].mean(), rows[:, 0].std()
    covered = ((rows[:, 1] <= expected) & (expected <= rows[:, 2])).mean()
    width = (rows[:, 2] - rows[:, 1]).mean()
    assert covered > 0.92
    assert width < 2 * 2.1 * spread * 1.5
