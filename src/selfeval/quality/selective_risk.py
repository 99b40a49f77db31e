"""Choose a confidence threshold for a wanted error rate, with a guarantee that holds for every model and distribution.

A selective predictor answers if its confidence is at least a threshold; its risk is the error rate among the cases that it
answers. The smallest threshold with a low measured risk is chosen on the same cases and is too optimistic. Learn then Test
(Angelopoulos et al. 2021, https://arxiv.org/abs/2110.01052) tests every threshold instead, and controls the probability that a
threshold with a higher risk passes.

Shapes: N labelled cases, independent and drawn from the distribution that the threshold is used on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from selfeval.quality.statistics import Figure, booleans, proportion

__all__ = ["DELTA", "GRID", "STARTS", "Threshold", "binomial_tail", "choose_threshold", "fewest_labels", "upper_bound"]

DELTA = 0.05
"""Default of the maximum probability that the chosen threshold has a higher risk than wanted."""
GRID = tuple(round(0.5 + k / 100, 2) for k in range(50, -1, -1))
"""Thresholds that are tested, in descending order. They are fixed: thresholds taken from the data void the guarantee."""
STARTS = (0.95, 0.85, 0.75, 0.65, 0.5)
"""Thresholds at which a sequence of tests starts. Several, because the highest may be reached by too few cases to pass."""
_HALVINGS = 60


@dataclass(frozen=True)
class Threshold:
    """The chosen threshold, and its measured risk.

    Attributes:
        value: the threshold; None if no threshold passed.
        error: the wanted risk.
        delta: maximum probability that the risk of the threshold is higher.
        selected: cases with at least this confidence; without a threshold, those of the last one that was tested.
        risk: measured risk among them.
        bound: one-sided upper confidence bound of their risk at the level that the test used; None without cases.
        coverage: share of all cases that are selected.
    """

    value: float | None
    error: float
    delta: float
    selected: int
    risk: Figure
    bound: float | None
    coverage: Figure


def binomial_tail(errors: int, n: int, rate: float) -> float:
    """Compute P(X <= errors) for X ~ Binomial(n, rate): the p-value of the hypothesis that the error rate is at least `rate`.

    Args:
        errors: number of errors, in [0, n].
        n: number of cases, >= 0.
        rate: error rate, in [0, 1].

    Raises:
        ValueError: errors is not in [0, n], or rate is not in [0, 1].

    Example:
        >>> round(binomial_tail(0, 29, 0.1), 4)  # 0.9^29
        0.0471
    """
    if not 0 <= errors <= n or not 0 <= rate <= 1:
        raise ValueError(f"need 0 <= errors <= n and a rate in [0, 1], got {errors} errors, n = {n}, rate {rate}")
    if rate in (0.0, 1.0):
        return float(rate == 0.0 or errors == n)
    log_p, log_q = math.log(rate), math.log1p(-rate)
    terms = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q
        for k in range(errors + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def upper_bound(errors: int, n: int, delta: float = DELTA) -> float:
    """Compute the one-sided exact upper confidence bound of an error rate: the largest rate with P(X <= errors) >= delta.

    Clopper and Pearson 1934 (https://doi.org/10.1093/biomet/26.4.404).

    Args:
        errors: number of errors, in [0, n].
        n: number of independent cases, > 0.
        delta: probability that the rate is above the bound, in (0, 1). Default: 0.05.

    Raises:
        ValueError: no cases, or errors or delta outside their range.

    Example:
        >>> round(upper_bound(0, 59), 3)  # 1 - 0.05^(1/59)
        0.05
    """
    if n <= 0 or not 0 < delta < 1:
        raise ValueError(f"a bound needs cases and a delta in (0, 1), got n = {n}, delta {delta}")
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if binomial_tail(errors, n, middle) > delta else (low, middle)
    return high


def fewest_labels(error: float, delta: float = DELTA) -> int:
    """Return the smallest number of selected cases with which a threshold can pass, if none of them is wrong.

    Example:
        >>> fewest_labels(0.1)  # 0.9^44 = 0.0097 < 0.05 / 5
        44
    """
    _check(error, delta)
    return math.floor(math.log(delta / len(STARTS)) / math.log1p(-error)) + 1


def choose_threshold(confidence: Sequence[float], correct: Sequence[bool], error: float, delta: float = DELTA) -> Threshold:
    """Choose the smallest threshold whose selective risk is at most `error`, except with probability `delta`.

    P(risk(threshold) <= error) >= 1 - delta

    Fixed-sequence testing with several starts (Angelopoulos et al. 2021, section 3 and its algorithm for fixed sequences). Each
    start of `STARTS` has delta / len(STARTS). From it, thresholds of `GRID` are tested in descending order until one fails. A
    threshold passes if the exact binomial test rejects a risk above `error`, so the upper bound of Clopper and Pearson is at
    most `error`. For errors of 0 and 1 this test is exact, so it is sharper than Hoeffding's and Bentkus' inequalities.

    The risk counts cases, so it holds for cases that are drawn independently: one pair per question.

    Args:
        confidence: [N], in [0, 1]. Cases that are never answered are left out by `confidence` 0.
        correct: [N], whether each answer is right.
        error: wanted risk, in (0, 1).
        delta: maximum probability of a higher risk, in (0, 1). Default: 0.05.

    Raises:
        ValueError: the lengths differ, or a number is outside its range.

    Example:
        >>> choose_threshold([0.9] * 60 + [0.6] * 40, [True] * 60 + [True, False] * 20, error=0.1).value
        0.61
    """
    _check(error, delta)
    right = booleans(correct, "outcomes")
    if len(confidence) != len(right) or not all(0 <= c <= 1 for c in confidence):
        raise ValueError(
            f"need one confidence in [0, 1] per outcome, got {len(confidence)} confidences and {len(right)} outcomes"
        )
    level = delta / len(STARTS)
    passes = {value: _passes(_selected(confidence, right, value), error, level) for value in GRID}
    passed = [value for start in STARTS for value in takewhile(passes.get, (v for v in GRID if v <= start))]
    return _described(min(passed, default=None), confidence, right, error, delta)


def _passes(outcomes: Sequence[bool], error: float, level: float) -> bool:
    return binomial_tail(outcomes.count(False), len(outcomes), error) <= level


def _selected(confidence: Sequence[float], right: Sequence[bool], threshold: float) -> list[bool]:
    return [r for c, r in zip(confidence, right, strict=True) if c >= threshold]


def _described(
    value: float | None, confidence: Sequence[float], right: Sequence[bool], error: float, delta: float
) -> Threshold:
    outcomes = _selected(confidence, right, GRID[-1] if value is None else value)
    wrong = outcomes.count(False)
    return Threshold(
        value=value,
        error=error,
        delta=delta,
        selected=len(outcomes),
        risk=proportion([not outcome for outcome in outcomes]),
        bound=upper_bound(wrong, len(outcomes), delta / len(STARTS)) if outcomes else None,
        coverage=proportion([c >= (GRID[-1] if value is None else value) for c in confidence]),
    )


def _check(error: float, delta: float) -> None:
    if not 0 < error < 1 or not 0 < delta < 1:
        raise ValueError(f"error and delta must be between 0 and 1, got {error} and {delta}")
