"""One probability from several signals of a choice: a logistic regression without an intercept, then a map on its logit.

The signals of a choice have the sign of the choice: positive for the first of two options, negative for the second. A
regression without an intercept is then antisymmetric, so the probability does not depend on the order of the options:

    logit = w · x        with x → -x if the options are swapped

Its weights are shrunk (L2), all but that of one main signal, so that the other signals need evidence to count. A second map,
from the size of the logit to a probability, is fitted to logits that were predicted for each case from the other cases
(Platt 1999, section 2.1, https://www.cs.colorado.edu/~mozer/Teaching/syllabi/6622/papers/Platt1999.pdf): logits of the cases
that a regression was fitted to are too large. It is a temperature (Guo et al. 2017, https://arxiv.org/abs/1706.04599) or an
isotonic regression, which assumes only that a larger logit is no less probable (Zadrozny and Elkan 2002,
https://doi.org/10.1145/775047.775151).

Shapes: N choices, F signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FEWEST_FOR_ISOTONIC",
    "Steps",
    "are_steps",
    "fit_steps",
    "fit_weights",
    "out_of_fold",
    "step_probability",
    "weighted",
]

Floats = NDArray[np.float64]
Steps = tuple[tuple[float, float], ...]
"""Points (size of the logit, probability) of an isotonic regression, ascending in both."""

FEWEST_FOR_ISOTONIC = 200
"""Cases below which no isotonic regression is fitted: with few cases it follows their noise (Niculescu-Mizil and Caruana 2005,
section 5, https://doi.org/10.1145/1102351.1102430)."""
_MAIN, _OTHERS = 10.0, 0.7
"""Prior standard deviations of the weight of a signal of unit size: of the main signal, and of each other one."""
_FOLDS = 5


def fit_weights(x_NF: Floats, label_N: Floats, main: int) -> Floats:
    """Fit the weights of an antisymmetric logistic regression with an L2 penalty.

    min_w Σ_i log(1 + exp(w · x_i)) - y_i w · x_i + Σ_f (w_f r_f / s_f)² / 2        r_f: root mean square of signal f

    The prior standard deviation s_f of a signal of unit size is 0.7, and 10 for `main`: without evidence in the other signals
    the regression is one on the main signal alone.

    Args:
        x_NF: [N, F] signed signals. One that is 0 everywhere gets the weight 0.
        label_N: [N] probability that the first option is right, in [0, 1]; soft labels are allowed.
        main: number of the signal that is hardly shrunk.

    Returns:
        [F] weights, in log-odds per unit of the signal.

    Raises:
        ValueError: there is no case, or the lengths differ.
    """
    from sklearn.linear_model import LogisticRegression  # lazy: takes a second to import

    if not len(x_NF) or len(x_NF) != len(label_N):
        raise ValueError(f"a regression needs cases with a label each, got {len(x_NF)} cases and {len(label_N)} labels")
    size_F = np.sqrt(np.square(x_NF).mean(0))
    # Not centred: a constant would break the symmetry of the options.
    unit_F = np.where(size_F > 0, size_F, 1.0)
    unit_F[main] /= _MAIN / _OTHERS
    # Each case in both classes with the weights y and 1 - y, because the classes of scikit-learn are not soft.
    twice_NF = np.concatenate([x_NF, x_NF]) / unit_F
    classes_N, weight_N = np.repeat([1, 0], len(x_NF)), np.concatenate([label_N, 1.0 - label_N])
    fitted = LogisticRegression(C=_OTHERS**2, fit_intercept=False, tol=1e-8, max_iter=1000)
    found: Floats = fitted.fit(twice_NF, classes_N, sample_weight=weight_N).coef_[0] / unit_F
    return found


def out_of_fold(
    x_NF: Floats, label_N: Floats, fit: Callable[[Floats, Floats], Floats], groups: Sequence[Hashable] | None = None
) -> Floats:
    """Return the weights `[N, F]` of each row as they are fitted to the rows of the other folds.

    Args:
        x_NF: [N, F] signed signals.
        label_N: [N] labels.
        fit: returns the weights of some rows with their labels.
        groups: Optional. [N] group of each row, such as its question; the rows of a group are in the same fold, since they are
            not independent. Default: each row is a group.
    """
    numbers: dict[Hashable, int] = {}
    fold_N = np.array([numbers.setdefault(group, len(numbers)) for group in groups or range(len(x_NF))]) % _FOLDS
    weight_NF = np.zeros_like(x_NF)
    for fold in range(_FOLDS):
        inside_N = fold_N == fold
        if inside_N.any() and not inside_N.all():
            weight_NF[inside_N] = fit(x_NF[~inside_N], label_N[~inside_N])
    return weight_NF


def fit_steps(size_N: Floats, outcome_N: Floats) -> Steps:
    """Fit an isotonic regression of outcomes on the sizes of logits, by pool adjacent violators.

    The probabilities are at least 1/2, since the choice would be the other one otherwise, and at most 1 - 1 / (N + 2), the
    mean of the posterior of N right choices out of N: no number of cases shows that all choices are right.

    Args:
        size_N: [N] sizes of the logits, >= 0.
        outcome_N: [N] outcomes in [0, 1].

    Raises:
        ValueError: there are fewer than `FEWEST_FOR_ISOTONIC` cases.
    """
    from sklearn.isotonic import IsotonicRegression  # lazy: takes a second to import

    if len(size_N) < FEWEST_FOR_ISOTONIC:
        raise ValueError(f"an isotonic regression needs {FEWEST_FOR_ISOTONIC} cases, got {len(size_N)}")
    fitted = IsotonicRegression(y_min=0.5, y_max=1.0 - 1.0 / (len(size_N) + 2), out_of_bounds="clip").fit(size_N, outcome_N)
    return tuple(zip(fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist(), strict=True))


def are_steps(found: object) -> bool:
    """Return whether a value of a file is a list of `Steps`: pairs of finite numbers, ascending in both, with probabilities.

    Example:
        >>> are_steps([[0, 0.5], [2.0, 0.9]]), are_steps([[2.0, 0.9], [0.0, 0.5]]), are_steps([[0.0, 1.5]])
        (True, False, False)
    """
    if not isinstance(found, list) or not all(isinstance(step, list) and len(step) == 2 for step in found):
        return False
    sizes, probabilities = [size for size, _ in found], [probability for _, probability in found]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (*sizes, *probabilities)):
        return False
    return sizes == sorted(sizes) and probabilities == sorted(probabilities) and all(0 <= p <= 1 for p in probabilities)


def step_probability(steps: Steps, size: float) -> float:
    """Return the probability of a choice whose logit has this size: linear between the points, constant outside.

    Example:
        >>> step_probability(((1.0, 0.5), (3.0, 0.9)), 2.0)
        0.7
    """
    at, probability = zip(*steps, strict=True)
    return float(np.interp(size, at, probability))


def weighted(names: Sequence[str], weights: Floats) -> dict[str, float]:
    """Return the weights by the name of their signal, with the precision of files."""
    return {name: round(float(weight), 6) for name, weight in zip(names, weights, strict=True)}
