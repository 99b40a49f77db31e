from __future__ import annotations

import math

import pytest

from golden_numbers import golden
from selfeval.algorithms.controllers import adaptive_kl_coefficient


@pytest.mark.parametrize("name", ["adaptive_kl", "adaptive_kl_edges"])
def test_a_run_of_updates_matches_golden(name: str) -> None:
    entry = golden("8_controllers")[name]
    params, beta = entry["params"], entry["params"]["init_beta"]
    for kl, expected in zip(entry["inputs"]["kls"], entry["expected"]["betas"], strict=True):
        beta = adaptive_kl_coefficient(
            beta,
            kl,
            target=params["target"],
            horizon=params["horizon"],
            samples=params["n_steps"],
            error_clip=params["clip"],
        )
        assert beta == pytest.approx(expected, rel=1e-9)


def test_the_default_clip_is_a_fifth() -> None:
    # KL at 10 times the target: e = clip(9, ±0.2) = 0.2; 100 of 1000 samples: β grows by 2 %.
    assert adaptive_kl_coefficient(0.5, 60.0, target=6.0, horizon=1000, samples=100) == pytest.approx(0.51)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_a_number_is_refused(kl: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        adaptive_kl_coefficient(0.1, kl, target=6.0, horizon=1000, samples=100)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 1000), (6.0, 0)])
def test_a_target_or_horizon_of_nothing_is_refused(target: float, horizon: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        adaptive_kl_coefficient(0.1, 6.0, target=target, horizon=horizon, samples=100)
