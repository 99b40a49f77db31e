from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golden_numbers import golden
from selfeval.algorithms.controllers import (
    AdamState,
    adam_update,
    adaptive_kl_coefficient,
    direct_temperature,
    dual_kl_coefficient,
    dual_temperature,
)


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


def dual() -> tuple[list[tuple[float, Any]], dict[str, Any], float]:
    """(what was measured, all expected numbers after that update), the parameters, and the start."""
    entry = golden("8_controllers")["dual_temperature"]
    names = entry["expected"]
    expected = [dict(zip(names, row, strict=True)) for row in zip(*names.values(), strict=True)]
    return (
        list(zip(entry["inputs"]["entropies"], expected, strict=True)),
        entry["params"],
        math.exp(entry["params"]["log_alpha0"]),
    )


@pytest.mark.parametrize("parameter", ["log", "exp"])
def test_a_run_of_dual_temperatures_matches_golden(parameter: Any) -> None:
    updates, params, alpha = dual()
    for entropy, expected in updates:
        alpha = dual_temperature(
            alpha, entropy, target=params["target_entropy"], learning_rate=params["lr"], parameter=parameter
        )
        assert alpha == pytest.approx(expected[f"sgd_{parameter}_param"], rel=1e-9)


def test_a_run_of_direct_temperatures_and_of_dual_coefficients_matches_golden() -> None:
    updates, params, start = dual()
    alpha = beta = start
    for measured, expected in updates:
        alpha = direct_temperature(alpha, measured, target=params["target_entropy"], learning_rate=params["lr"])
        beta = dual_kl_coefficient(beta, measured, target=params["target_entropy"], learning_rate=params["lr"])
        assert alpha == pytest.approx(expected["sgd_direct_nonneg"], rel=1e-9)
        assert beta == pytest.approx(expected["kl_dual_log_param"], rel=1e-9)


@pytest.mark.parametrize("parameter", ["log", "exp"])
def test_a_run_of_adam_on_a_temperature_matches_golden(parameter: str) -> None:
    updates, params, start = dual()
    log_alpha, state = math.log(start), AdamState()
    for entropy, expected in updates:
        gradient = (entropy - params["target_entropy"]) * (math.exp(log_alpha) if parameter == "exp" else 1)
        log_alpha, state = adam_update(log_alpha, gradient, state, learning_rate=params["lr"])
        assert math.exp(log_alpha) == pytest.approx(expected[f"adam_{parameter}_param"], rel=1e-9)
    assert state.updates == len(updates)


def test_the_default_temperature_is_that_of_its_logarithm() -> None:
    # H is half a nat short: log α rises by 0.1 · 0.5.
    alpha = dual_temperature(0.2, 1.0, target=1.5, learning_rate=0.1)
    assert alpha == pytest.approx(0.2 * math.exp(0.05))
    assert dual_temperature(0.2, 1.0, target=1.5, learning_rate=0.1, parameter="log") == alpha


def test_a_direct_temperature_stops_at_nothing_and_comes_back() -> None:
    # 1 nat too much entropy: 0.05 − 0.1 is below 0. Then 1 nat too little.
    assert direct_temperature(0.05, 2.0, target=1.0, learning_rate=0.1) == 0
    assert direct_temperature(0.0, 0.0, target=1.0, learning_rate=0.1) == pytest.approx(0.1)


def test_other_decays_of_adam_are_used() -> None:
    # β1 = β2 = 0: no memory, so the step is lr · g / (|g| + eps).
    parameter, state = adam_update(1.0, -4.0, AdamState(9.0, 9.0, 9), learning_rate=0.5, betas=(0.0, 0.0), eps=1.0)
    assert parameter == pytest.approx(1.0 + 0.5 * 4 / 5)
    assert state == AdamState(-4.0, 16.0, 10)


@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_what_is_not_a_number_steers_nothing(measured: float) -> None:
    for update in (
        lambda: dual_temperature(0.1, measured, target=1.0, learning_rate=0.1),
        lambda: direct_temperature(0.1, measured, target=1.0, learning_rate=0.1),
        lambda: dual_kl_coefficient(0.1, measured, target=1.0, learning_rate=0.1),
        lambda: adam_update(0.1, measured, AdamState(), learning_rate=0.1),
    ):
        with pytest.raises(ValueError, match="finite"):
            update()


def test_duals_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"coefficient and target must be positive, got 0.0 and 6.0"):
        dual_kl_coefficient(0.0, 1.0, target=6.0, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"got 0.1 and 0.0"):
        dual_kl_coefficient(0.1, 1.0, target=0.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        dual_temperature(0.0, 1.0, target=1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"'log' or 'exp', got 0.1 and 'linear'"):
        dual_temperature(0.1, 1.0, target=1.0, learning_rate=0.1, parameter="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"temperature must be >= 0, got -0.1"):
        direct_temperature(-0.1, 1.0, target=1.0, learning_rate=0.1)
    for update in (
        lambda: dual_temperature(0.1, 1.0, target=1.0, learning_rate=0.0),
        lambda: direct_temperature(0.1, 1.0, target=1.0, learning_rate=0.0),
        lambda: dual_kl_coefficient(0.1, 1.0, target=1.0, learning_rate=0.0),
        lambda: adam_update(0.1, 1.0, AdamState(), learning_rate=0.0),
    ):
        with pytest.raises(ValueError, match=r"learning_rate must be positive, got 0.0"):
            update()


@pytest.mark.parametrize("horizon", [1, 10, 25, 100])
def test_a_short_horizon_never_pays_for_the_kl(horizon: int) -> None:
    # 128 samples and a horizon of 25: 1 − 0.2 · 128 / 25 = −0.024. One update is limited to the paper's ± 20 %.
    assert adaptive_kl_coefficient(0.1, 0.0, target=4.0, horizon=horizon, samples=128) == pytest.approx(0.08)
    assert adaptive_kl_coefficient(0.1, 100.0, target=4.0, horizon=horizon, samples=128) == pytest.approx(0.12)


def test_a_long_horizon_is_in_proportion_as_before() -> None:
    # e = 8 / 4 − 1 = 1, clipped to 0.2: 0.1 (1 + 0.2 · 128 / 2000) = 0.10128
    assert adaptive_kl_coefficient(0.1, 8.0, target=4.0, horizon=2000, samples=128) == pytest.approx(0.10128, rel=1e-12)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
WEIGHT = st.floats(1e-300, 1e300)


@given(WEIGHT, FINITE, st.floats(1e-6, 1e6), st.integers(1, 10**6), st.integers(0, 10**9))
def test_an_adaptive_coefficient_stays_positive_and_moves_by_a_fifth_at_most(
    coefficient: float, kl: float, target: float, horizon: int, samples: int
) -> None:
    moved = adaptive_kl_coefficient(coefficient, kl, target=target, horizon=horizon, samples=samples)
    assert 0 < moved < math.inf
    assert min(0.8 * coefficient, 1e300) * (1 - 1e-9) <= moved <= max(1.2 * coefficient, 1e-300) * (1 + 1e-9)


@given(WEIGHT, st.floats(-1e300, 1e300), st.floats(1e-9, 1e9))
def test_no_dual_overflows_or_reaches_zero(weight: float, measured: float, rate: float) -> None:
    # e^710 raises OverflowError in Python, and e^-746 is 0, from which a multiplier would never come back.
    assert 0 < dual_kl_coefficient(weight, measured, target=4.0, learning_rate=rate) < math.inf
    for parameter in ("log", "exp"):
        assert 0 < dual_temperature(weight, measured, target=4.0, learning_rate=rate, parameter=parameter) < math.inf
    assert 0 <= direct_temperature(weight, measured, target=4.0, learning_rate=rate) < math.inf
    assert math.isfinite(adam_update(0.0, measured, AdamState(), learning_rate=rate)[0])


def test_a_dual_saturates_and_comes_back() -> None:
    high = dual_kl_coefficient(0.1, 1e9, target=1.0, learning_rate=1.0)
    assert high == pytest.approx(1e300, rel=1e-9)
    assert dual_kl_coefficient(high, 0.0, target=1.0, learning_rate=math.log(10)) == pytest.approx(1e299, rel=1e-9)


def test_arguments_of_the_adaptive_control_outside_their_range_are_refused() -> None:
    for wrong in ({"coefficient": 0.0}, {"samples": -1}, {"error_clip": 1.0}):
        sound = {"coefficient": 0.1, "kl": 1.0, "target": 1.0, "horizon": 10, "samples": 1}
        with pytest.raises(ValueError, match="coefficient must be > 0, samples >= 0"):
            adaptive_kl_coefficient(**sound | wrong)  # type: ignore[arg-type]
