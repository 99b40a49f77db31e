"""Estimates from pairs that were not drawn uniformly."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest

from selfeval.labelling import weights
from selfeval.labelling.weights import Share, draw_probabilities, labels_to_halve, lure_weights, weighted_share
from selfeval.quality.statistics import Figure, clustered_mean, wilson_interval

WEIGHTS = [4.0, 1.0, 0.5, 2.0, 0.1]
VALUES = [1.0, 0.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("draws", [1, 2, 3, 5])
@pytest.mark.parametrize("uniform", [0.2, 0.5, 1.0])
def test_the_estimate_is_unbiased_over_all_orders_of_the_draws(draws: int, uniform: float) -> None:
    """The exact expectation, summed over every order of five pairs with its probability."""
    expected = chance = 0.0
    for order in itertools.permutations(range(5)):
        q_N = draw_probabilities([WEIGHTS[i] for i in order], uniform)
        v_M = lure_weights(q_N[:draws].tolist(), 5)
        estimate = sum(v * VALUES[i] for v, i in zip(v_M, order, strict=False)) / draws
        expected += math.prod(q_N) * estimate
        chance += math.prod(q_N)
    assert chance == pytest.approx(1.0, abs=1e-12)
    assert expected == pytest.approx(sum(VALUES) / 5, abs=1e-12)


def test_all_pairs_have_equal_weights() -> None:
    assert lure_weights([0.9, 0.9, 1.0], 3).tolist() == [1.0, 1.0, 1.0]


def test_a_draw_that_was_more_likely_than_uniform_counts_less() -> None:
    # 1 + 9 / 9 (1 / (10 q) − 1) = 1 / (10 q)
    assert lure_weights([0.4], 10).tolist() == pytest.approx([0.25])


def test_equal_weights_give_the_clustered_mean() -> None:
    # Pairs of one question agree, so there are fewer effective cases than questions.
    credits, questions = [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0], list("aaabbcde")
    share, plain = weighted_share(credits, [1.0] * 8, questions), clustered_mean(credits, questions)
    assert share.figure.value == plain.value
    # The same variance: s = reach / t_4 by `clustered_mean`.
    error = (plain.ci_high - plain.known) / 2.7764451052  # type: ignore[operator]
    assert share.effective == pytest.approx(plain.known * (1 - plain.known) / error**2)


def test_pairs_of_one_question_are_one_case() -> None:
    together = weighted_share([1.0] * 10, [1.0] * 10, ["q"] * 10)
    assert together.figure == Figure(1.0, *wilson_interval(1, 1), 1)
    assert weighted_share([1.0] * 10, [1.0] * 10, range(10)).figure == Figure(1.0, *wilson_interval(10, 10), 10)


def test_unequal_weights_widen_the_interval() -> None:
    # (3 + 1)^2 / (9 + 1) = 1.6 effective cases of two
    assert weighted_share([1.0, 1.0], [3.0, 1.0], "ab").effective == pytest.approx(1.6)


def test_there_is_no_share_of_nothing() -> None:
    assert weighted_share([], [], []) == Share(Figure(None, None, None, 0), 0.0)
    assert labels_to_halve(weighted_share([], [], []), 0) is None


def test_the_promised_labels_halve_the_interval() -> None:
    share = weighted_share([1.0] * 30 + [0.0] * 10, [1.0] * 40, range(40))
    more = labels_to_halve(share, 40)
    assert more is not None
    n = share.effective * (40 + more) / 40
    low, high = wilson_interval(0.75 * n, n)
    figure = share.figure
    assert high - low == pytest.approx((figure.ci_high - figure.ci_low) / 2, rel=0.01)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: draw_probabilities([1.0, 0.0], 0.5), "weights must be positive"),
        (lambda: draw_probabilities([1.0], 0.0), "uniform in"),
        (lambda: lure_weights([0.5] * 3, 2), "at most 2 probabilities"),
        (lambda: lure_weights([0.0], 2), r"probabilities in \(0, 1\]"),
        (lambda: weighted_share([2.0], [1.0], ["a"]), r"credits must be in \[0, 1\]"),
        (lambda: weighted_share([1.0], [1.0], []), "equal lengths"),
    ],
)
def test_wrong_numbers_are_refused(call: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        call()  # type: ignore[operator]


def test_the_probabilities_of_a_draw_sum_to_one() -> None:
    # Over all that may come first: the other four in any order.
    first = [draw_probabilities([w, *(v for v in WEIGHTS if v != w)], 0.5)[0] for w in WEIGHTS]
    assert np.sum(first) == pytest.approx(1.0)


def test_the_examples_in_the_docstrings_hold() -> None:
    found = doctest.testmod(weights)
    assert found.attempted == 4
    assert found.failed == 0
