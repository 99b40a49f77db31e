"""The antisymmetric regression: against a direct minimisation of its objective, and the isotonic regression by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from selfeval.quality.signed_regression import FEWEST_FOR_ISOTONIC, fit_steps, fit_weights, out_of_fold, step_probability


def cases(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    x_NF = rng.normal(size=(n, 3)) * [1.0, 4.0, 0.2]
    label_N = 1 / (1 + np.exp(-(x_NF @ [0.3, 0.4, 0.0])))
    return x_NF, label_N


def test_the_weights_minimise_the_penalised_loss() -> None:
    x_NF, label_N = cases(60)
    size_F = np.sqrt((x_NF**2).mean(0))

    def loss(w: np.ndarray) -> float:  # type: ignore[type-arg]
        logit_N = x_NF @ w
        penalty = ((w * size_F / [0.7, 10.0, 0.7]) ** 2).sum() / 2
        return float((np.logaddexp(0, logit_N) - label_N * logit_N).sum() + penalty)

    expected = minimize(loss, np.zeros(3), tol=1e-12).x
    assert fit_weights(x_NF, label_N, main=1) == pytest.approx(expected, abs=1e-4)


def test_swapping_the_options_changes_nothing_and_an_absent_signal_has_no_weight() -> None:
    x_NF, label_N = cases(60)
    x_NF[:, 2] = 0.0
    found = fit_weights(x_NF, label_N, main=0)
    assert found[2] == 0.0
    turned_N = np.arange(60) % 3 == 0
    swapped_NF = np.where(turned_N[:, None], -x_NF, x_NF)
    assert fit_weights(swapped_NF, np.where(turned_N, 1 - label_N, label_N), main=0) == pytest.approx(found, abs=1e-5)
    with pytest.raises(ValueError, match="got 60 cases and 59 labels"):
        fit_weights(x_NF, label_N[1:], main=0)


def test_a_row_has_the_weights_of_the_other_folds() -> None:
    x_NF, label_N = cases(20)
    seen: list[int] = []

    def fit(x: np.ndarray, label: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        seen.append(len(x))
        return np.array([label.sum(), 0.0, 0.0])

    weight_NF = out_of_fold(x_NF, label_N, fit, groups=[i // 2 for i in range(20)])
    assert seen == [16] * 5
    # Rows 0 and 1 are of one case, as are 10 and 11: with five folds of ten cases, they are the first fold.
    left_out = label_N[[0, 1, 10, 11]].sum()
    assert weight_NF[[0, 1, 10, 11], 0] == pytest.approx(label_N.sum() - left_out)
    assert weight_NF[2, 0] == pytest.approx(label_N.sum() - label_N[[2, 3, 12, 13]].sum())


def test_adjacent_violators_are_pooled_and_no_probability_is_certain() -> None:
    # Of sizes 1, 2, 3: 40 of 80 are right, 70 of 80, 65 of 80. The last two are pooled: 135 of 160. The fourth is always right.
    outcomes = [(1.0, 40, 80), (2.0, 70, 80), (3.0, 65, 80), (4.0, 60, 60)]
    sizes = np.repeat([size for size, _, _ in outcomes], [n for _, _, n in outcomes])
    right = np.concatenate([np.arange(n) < k for _, k, n in outcomes]).astype(float)
    steps = fit_steps(sizes, right)
    assert [step_probability(steps, size) for size in (1.0, 2.0, 3.0)] == pytest.approx([0.5, 135 / 160, 135 / 160])
    assert step_probability(steps, 4.0) == step_probability(steps, 99.0) == pytest.approx(1 - 1 / 302)
    with pytest.raises(ValueError, match=f"needs {FEWEST_FOR_ISOTONIC} cases, got 199"):
        fit_steps(sizes[:199], right[:199])
