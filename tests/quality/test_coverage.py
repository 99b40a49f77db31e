"""The intervals have their nominal coverage: the simulations of benchmarks/coverage.py, with fewer draws.

Earlier intervals failed here: a bootstrap of the calibration error held a true 0 in 16 to 42% of draws, ties alone had the
interval [0.5, 0.5], and replies to one question counted as independent.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DRAWS = 200
SLACK = 0.025
"""Coverage that Wilson's interval, and Student's on skewed values, lack at a few sizes, as tables in the literature show."""


def _loaded() -> ModuleType | None:
    path = BENCHMARKS / "coverage.py"
    if not path.is_file():
        return None
    # By its path: the package of the same name, which measures the coverage of tests, may be installed.
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


BENCHMARK = _loaded()
pytestmark = pytest.mark.skipif(BENCHMARK is None, reason="benchmarks/coverage.py is not part of this source tree")
STUDIES = BENCHMARK.INTERVALS if BENCHMARK else ()


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_an_interval_holds_the_truth_as_often_as_it_says(study: object) -> None:
    assert BENCHMARK is not None
    for n in (study.sizes[0], 30):  # type: ignore[attr-defined]
        found = BENCHMARK.coverage(study, n, DRAWS)["measured"]
        error = math.sqrt(0.05 * 0.95 / found["n"])
        assert found["value"] >= 0.95 - SLACK - 3 * error, f"n = {n}: {found}"


@pytest.mark.slow
def test_a_true_calibration_error_of_zero_is_within_the_interval() -> None:
    assert BENCHMARK is not None
    (study,) = (study for study in STUDIES if "true value 0" in study.name)
    for n in (10, 100):
        found = BENCHMARK.coverage(study, n, 200)["measured"]
        assert found["value"] >= 0.95, f"n = {n}: {found}"


def test_a_measured_coverage_knows_an_interval_that_is_too_narrow() -> None:
    """The check fails for the percentile bootstrap, the former interval of the mean."""
    assert BENCHMARK is not None
    from selfeval.quality.statistics import Figure, bootstrap_interval

    def draw(rng: object, n: int) -> tuple[Figure, float]:
        values_N = rng.gamma(2.0, 1.5, size=n)  # type: ignore[attr-defined]
        low, high = bootstrap_interval(lambda index_RN: values_N[index_RN].mean(-1), n, resamples=200)
        return Figure(float(values_N.mean()), low, high, n), 3.0

    found = BENCHMARK.coverage(BENCHMARK.Study("bootstrap", draw), 5, 1000)["measured"]
    assert found["ci_high"] < 0.95 - SLACK


def test_scores_that_a_threshold_splits_are_fitted_closely() -> None:
    assert BENCHMARK is not None
    assert all(BENCHMARK.separable(n, 20)["largest_loss"] < 0.05 for n in (4, 16, 64))
