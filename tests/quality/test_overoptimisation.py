from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from selfeval.quality.overoptimisation import (
    best_of_n,
    best_of_n_kl,
    fit_best_of_n,
    fit_reinforcement,
    logistic_fit,
)


def test_the_kl_of_the_best_of_n_is_that_of_order_statistics() -> None:
    # Over N equally likely samples with distinct scores the favourite of n draws with replacement is the i-th lowest with
    # probability (i/N)^n - ((i-1)/N)^n; as N grows its KL to uniform goes to log n - (n-1)/n.
    for n in (2, 5, 30):
        many = 200_000
        edges = (np.arange(many + 1) / many) ** n
        p = np.diff(edges)
        p = p[p > 0]
        assert best_of_n_kl(n) == pytest.approx(float((p * np.log(p * many)).sum()), abs=1e-3)
    with pytest.raises(ValueError, match="at least 1"):
        best_of_n_kl(0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(n)
    proxy, gold = list(rng.normal(size=7)), [float(x) for x in rng.integers(0, 2, size=7)]
    subsets = list(itertools.combinations(range(7), n))
    expected = sum(gold[max(rows, key=lambda i: proxy[i])] for rows in subsets) / len(subsets)
    assert best_of_n(proxy, gold, n) == pytest.approx(expected, abs=1e-12)


def test_samples_that_score_alike_share_their_value_whatever_their_order() -> None:
    # Subsets of two of (0, 1, 1): the favourite scores 1 in all three, and is worth (1 + 0) / 2.
    assert best_of_n([0.0, 1.0, 1.0], [0.0, 1.0, 0.0], 2) == pytest.approx(0.5)
    assert best_of_n([0.0, 1.0, 1.0], [0.0, 0.0, 1.0], 2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="best of 3"):
        best_of_n([0.0, 1.0], [0.0, 1.0], 3)


def test_the_fits_find_the_coefficients_of_their_own_curves() -> None:
    d = [0.3, 0.7, 1.1, 2.0, 3.5]
    found = fit_best_of_n(d, [x * (0.8 - 0.15 * x) for x in d])
    assert (found.alpha, found.beta, found.rmse) == pytest.approx((0.8, 0.15, 0.0), abs=1e-9)
    found = fit_reinforcement(d, [x * (0.6 - 0.25 * math.log(x)) for x in d])
    assert (found.alpha, found.beta, found.rmse) == pytest.approx((0.6, 0.25, 0.0), abs=1e-9)
    crossed = fit_best_of_n(d, [x * (0.6 - 0.25 * math.log(x)) for x in d])
    assert crossed.rmse > 1e-3  # another curve does not fit it
    with pytest.raises(ValueError, match="two different distances"):
        fit_reinforcement([0.0, 1.0], [0.0, 1.0])


def test_the_logistic_fit_is_where_the_likelihood_is_flat() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(3.0, 2.0, size=4000)
    right = rng.random(4000) < 1 / (1 + np.exp(-(1.5 * scores - 4.0)))
    a, b = logistic_fit(scores.tolist(), right.tolist())
    assert (a, b) == pytest.approx((1.5, -4.0), abs=0.35)
    p = 1 / (1 + np.exp(-(a * scores + b)))
    assert float((p - right).mean()) == pytest.approx(0.0, abs=1e-8)  # the constant has no ridge


def test_what_does_not_vary_gives_the_share_alone() -> None:
    assert logistic_fit([2.0, 2.0, 2.0], [True, False, True]) == pytest.approx((0.0, math.log(2.5 / 1.5)))
    assert logistic_fit([1.0, 2.0], [True, True]) == pytest.approx((0.0, math.log(5.0)))
    a, _ = logistic_fit([0.0, 1.0, 2.0, 3.0], [False, False, True, True])  # split without an error
    assert 1 < a < 100


@pytest.mark.parametrize(
    ("wrong", "possible"),
    # Log losses of the fit that the ridge allows, found by a search over a grid; the undamped fit raised LinAlgError at 15
    # and ended at 6.19 with 63.
    [(15, 0.05), (63, 0.11), (4000, 0.11)],
)
def test_separable_scores_are_fitted(wrong: int, possible: float) -> None:
    scores, right = [-1.0] * wrong + [1.0], [False] * wrong + [True]
    a, b = logistic_fit(scores, right)
    logits = a * np.array(scores) + b
    assert float((np.logaddexp(0, logits) - np.array(right) * logits).sum()) < possible
    assert math.isfinite(a)
    assert math.isfinite(b)


@pytest.mark.parametrize("seed", range(40))
def test_the_fit_never_raises_and_is_a_minimum(seed: int) -> None:
    """Against a search that knows no derivative: no step to any side lowers the penalised loss."""
    rng = np.random.default_rng(seed)
    n, scale = int(rng.integers(2, 60)), float(10.0 ** rng.integers(-200, 200))
    scores = rng.standard_t(1, size=n) * scale  # heavy tails: a few scores are far from the others
    right = (rng.random(n) < 0.3).tolist() if seed % 2 else (scores > np.median(scores)).tolist()
    a, b = logistic_fit(scores.tolist(), right)
    assert math.isfinite(a)
    assert math.isfinite(b)
    x = scores / scale
    x = (x - x.mean()) / x.std()
    slope = a * scores.std() if 1e-150 < scale < 1e150 else a * scale * (scores / scale).std()
    constant = b + slope * (scores / scale).mean() / (scores / scale).std()

    def loss(w: float, c: float) -> float:
        logits = w * x + c
        return float((np.logaddexp(0, logits) - np.array(right) * logits).sum() + 1e-3 * n * w * w / 2)

    if 0 < sum(right) < n:
        here = loss(slope, constant)
        assert all(loss(slope + dw, constant + dc) > here - 1e-9 for dw in (-1e-2, 0, 1e-2) for dc in (-1e-2, 0, 1e-2))


def test_a_fit_needs_finite_scores_and_known_labels() -> None:
    with pytest.raises(ValueError, match="finite"):
        logistic_fit([math.nan, 1.0], [True, False])
    with pytest.raises(ValueError, match="got None at position 1"):
        logistic_fit([0.0, 1.0], [True, None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="0 scores"):
        logistic_fit([], [])
