"""Measure the coverage of the report's 95% intervals, and the rate at which differences are claimed where there are none.

python benchmarks/coverage.py [--draws 600]

Every statistic of the report is tested on simulated cases with known true values, for small and large n. One thread, fixed
seeds. A coverage measured on 600 draws has a standard error of 0.9 points.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import write

from selfeval.quality.calibration import calibration_error
from selfeval.quality.comparisons import compare_paired, compare_with_level
from selfeval.quality.length_control import length_controlled_win_rate
from selfeval.quality.overoptimisation import logistic_fit
from selfeval.quality.statistics import Figure, clustered_mean, mean_figure, proportion, ratio_of_means, spearman_figure

Rng = np.random.Generator
Draw = Callable[[Rng, int], tuple[Figure, float]]
"""Draw n cases; return their figure and the true value."""

SIZES = (5, 10, 20, 50, 200)
SLOW = {"length-controlled win rate": 0.3, "calibration error, true value 0": 0.3, "calibration error, too sure": 0.3}
"""Share of the draws used for statistics that are themselves simulations."""


@dataclass(frozen=True)
class Study:
    """A statistic and the numbers of cases at which it is tested."""

    name: str
    draw: Draw
    sizes: Sequence[int] = SIZES


def _share(rng: Rng, n: int) -> tuple[Figure, float]:
    return proportion((rng.random(n) < 0.9).tolist()), 0.9


def _paired(rng: Rng, n: int) -> tuple[Figure, float]:
    cells = np.array([(1, 1), (1, 0), (0, 1), (0, 0)], dtype=float)
    both = cells[rng.choice(4, size=n, p=[0.7, 0.15, 0.05, 0.1])]
    return compare_paired(both[:, 0].tolist(), both[:, 1].tolist()).difference, 0.1


def _half_credits(rng: Rng, n: int) -> tuple[Figure, float]:
    ours, theirs = rng.random(n) < 0.9, rng.choice([1.0, 0.5, 0.0], size=n, p=[0.5, 0.2, 0.3])
    return compare_paired(ours.astype(float).tolist(), theirs.tolist()).difference, 0.9 - 0.6


def _clustered(rng: Rng, n: int) -> tuple[Figure, float]:
    """Draw four replies to each of n questions; replies to one question share its difficulty."""
    chance_N = np.repeat(rng.beta(2, 1, size=n), 4)
    scores = (rng.random(4 * n) < chance_N).astype(float).tolist()
    return compare_with_level(scores, questions=np.repeat(np.arange(n), 4).tolist()).difference, 2 / 3 - 0.5


def _win_rate(rng: Rng, n: int) -> tuple[Figure, float]:
    return mean_figure(rng.choice([1.0, 0.5, 0.0], size=n, p=[0.3, 0.6, 0.1]).tolist()), 0.6


def _mostly_ties(rng: Rng, n: int) -> tuple[Figure, float]:
    return mean_figure(rng.choice([1.0, 0.5, 0.0], size=n, p=[0.03, 0.95, 0.02]).tolist()), 0.505


def _mean(rng: Rng, n: int) -> tuple[Figure, float]:
    """Draw the KL of replies in nats, from a skewed distribution."""
    return mean_figure(rng.gamma(2.0, 1.5, size=n).tolist(), bounds=None), 3.0


def _ratio(rng: Rng, n: int) -> tuple[Figure, float]:
    before_N = rng.gamma(8.0, 5.0, size=n)
    return ratio_of_means((before_N * rng.normal(1.1, 0.3, size=n)).tolist(), before_N.tolist()), 1.1


def _gap(rng: Rng, n: int) -> tuple[Figure, float]:
    """Draw the difference of predicted and actual accuracy, for four replies to each of n questions."""
    values_N = 0.05 + np.repeat(rng.normal(0, 0.2, size=n), 4) + rng.normal(0, 0.3, size=4 * n)
    return clustered_mean(values_N.tolist(), np.repeat(np.arange(n), 4).tolist()), 0.05


def _spearman(rng: Rng, n: int) -> tuple[Figure, float]:
    """Normal with r = 0.5, of which Spearman's is 6 / pi asin(r / 2)."""
    x_N, noise_N = rng.normal(size=n), rng.normal(size=n)
    figure = spearman_figure(x_N.tolist(), (0.5 * x_N + math.sqrt(0.75) * noise_N).tolist())
    return figure, 6 / math.pi * math.asin(0.25)


def _calibrated(rng: Rng, n: int) -> tuple[Figure, float]:
    confidence_N = _confidences(rng, n)
    return calibration_error(confidence_N.tolist(), (rng.random(n) < confidence_N).tolist()), 0.0


def _too_sure(rng: Rng, n: int) -> tuple[Figure, float]:
    confidence_N = 0.6 + 0.4 * rng.random(n)
    return calibration_error(confidence_N.tolist(), (rng.random(n) < confidence_N - 0.1).tolist()), 0.1


def _confidences(rng: Rng, n: int) -> Any:
    return 1 / (1 + np.exp(-np.abs(rng.normal(0, 2.5, size=n))))


def _length_controlled(rng: Rng, n: int) -> tuple[Figure, float]:
    """P(win) = sigma(1 + 2 tanh(d / sd)): sigma(1) at equal length."""
    d_N = rng.normal(0, 50, size=n)
    wins_N = rng.random(n) < 1 / (1 + np.exp(-(1 + 2 * np.tanh(d_N / 50))))
    return length_controlled_win_rate(wins_N.astype(float).tolist(), d_N.tolist()), 1 / (1 + math.exp(-1))


INTERVALS = (
    Study("share of yes (Wilson)", _share),
    Study("paired difference, right or wrong (Newcombe)", _paired),
    Study("paired difference, half credits", _half_credits),
    Study("win rate less one half, 4 replies a question", _clustered),
    Study("win rate with ties", _win_rate),
    Study("win rate, 95% ties", _mostly_ties),
    Study("mean without bounds (Student)", _mean),
    Study("ratio of means", _ratio),
    Study("gap of over-optimisation, 4 replies a question", _gap),
    Study("rank correlation", _spearman, SIZES[1:]),
    Study("calibration error, true value 0", _calibrated, SIZES[1:]),
    Study("calibration error, too sure", _too_sure, SIZES[1:]),
    Study("length-controlled win rate", _length_controlled),
)


def coverage(study: Study, n: int, draws: int) -> dict[str, Any]:
    """Return how often the interval contains the true value; draws without an interval are counted separately."""
    rng, held, without = np.random.default_rng(n), 0, 0
    draws = max(100, round(draws * SLOW.get(study.name, 1.0)))
    for _ in range(draws):
        figure, truth = study.draw(rng, n)
        if figure.ci_low is None or figure.ci_high is None:
            without += 1
        else:
            held += figure.ci_low - 1e-9 <= truth <= figure.ci_high + 1e-9
    counted = draws - without
    measured = proportion([True] * held + [False] * (counted - held)).as_json()
    return {"statistic": study.name, "n": n, "nominal": 0.95, "measured": measured, "without_interval": without}


NULLS = {
    "win rate, no ties": ((1.0, 0.0), (0.5, 0.5)),
    "win rate, half ties": ((1.0, 0.5, 0.0), (0.25, 0.5, 0.25)),
    "win rate, mostly ties": ((1.0, 0.5, 0.0), (0.05, 0.9, 0.05)),
}


def false_claims(name: str, n: int, draws: int) -> dict[str, Any]:
    """Return how often a difference is claimed where there is none."""
    scores, chances = NULLS[name]
    drawn = np.random.default_rng(n).choice(scores, size=(draws, n), p=chances).tolist()
    claimed = [compare_with_level(row).finding in ("better", "worse") for row in drawn]
    return {"comparison": name, "n": n, "nominal": 0.05, "measured": proportion(claimed).as_json()}


def separable(n: int, draws: int) -> dict[str, Any]:
    """Log loss per case of `logistic_fit` on scores that one threshold splits, of one right reply among n."""
    rng, losses = np.random.default_rng(n), []
    for _ in range(draws):
        scores, right = [*rng.normal(-3, 1, size=n - 1).tolist(), 3.0], [False] * (n - 1) + [True]
        a, b = logistic_fit(scores, right)
        logits = a * np.array(scores) + b
        losses.append(float((np.logaddexp(0, logits) - np.array(right) * logits).mean()))
    return {"n": n, "largest_loss": round(max(losses), 6), "draws": draws}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=600)
    draws = parser.parse_args().draws
    started = time.process_time()
    intervals = [coverage(study, n, draws) for study in INTERVALS for n in study.sizes]
    claims = [false_claims(name, n, 4 * draws) for name in NULLS for n in (4, 5, 6, 8, 10, 20, 50)]
    for row in intervals:
        print(f"{row['statistic']:48} n = {row['n']:5}  {100 * row['measured']['value']:.1f}%  ({row['without_interval']})")
    for row in claims:
        print(f"{row['comparison']:48} n = {row['n']:5}  claimed {100 * row['measured']['value']:.1f}%")
    seconds = round(time.process_time() - started, 1)
    found = {"draws": draws, "cpu_seconds": seconds, "intervals": intervals, "false_claims": claims}
    write("coverage", "python benchmarks/coverage.py", {**found, "separable": [separable(n, 200) for n in (4, 16, 64, 256)]})


if __name__ == "__main__":
    main()
