from __future__ import annotations

import math
import random
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pytest

from selfeval.algorithms.controllers import adaptive_kl_coefficient
from selfeval.config import PolicyConfig
from selfeval.training.kl_control import KLControl


def control(**changes: Any) -> KLControl:
    return KLControl(PolicyConfig(**{"kl_target": 2.0, "kl_coefficient": 0.1, "kl_rate": 0.5, "iterations": 9, **changes}))


def test_a_fixed_weight_stays_and_an_adaptive_one_follows_its_formula() -> None:
    fixed, adaptive = control(kl_control="fixed"), control(kl_control="adaptive", kl_horizon=500)
    fixed.update(50.0, 100)
    adaptive.update(50.0, 100)
    assert fixed.coefficient == 0.1
    assert (
        adaptive.coefficient == adaptive_kl_coefficient(0.1, 50.0, target=2.0, horizon=500, samples=100) == pytest.approx(0.104)
    )


def test_the_dual_weight_by_hand() -> None:
    dual = control()
    assert dual.coefficient == 0.1
    dual.update(0.0, 100)  # error -1, on its way: only the proportional part
    assert dual.coefficient == pytest.approx(0.1)
    dual.update(1.0, 100)  # error -0.5
    assert dual.coefficient == pytest.approx(0.1 * math.exp(0.5))
    dual.update(3.0, 100)  # error 0.5: the target was reached, so the multiplier 0.1 e moves by exp(0.5 * 0.5)
    assert dual.coefficient == pytest.approx(0.1 * math.exp(1 + 0.25 + 0.5))
    dual.update(90.0, 100)  # counts as half the target too much: 0.25 again
    assert dual.coefficient == pytest.approx(0.1 * math.exp(1 + 0.5 + 0.5))
    dual.update(1.6, 100)  # error -0.2: goes down now
    assert dual.coefficient == pytest.approx(0.1 * math.exp(1 + 0.5 - 0.1 - 0.2))


def test_the_multiplier_waits_for_the_target_but_not_for_ever() -> None:
    dual = control()
    weights = []
    for _ in range(5):
        dual.update(1.8, 100)  # error -0.1, never above
        weights.append(dual.coefficient)
    start = 0.1 * math.exp(1 - 0.1)
    # nine iterations: it moves from the third on
    assert weights == pytest.approx([start, start, *(start * math.exp(-0.05 * n) for n in (1, 2, 3))])


def test_it_goes_on_from_its_state() -> None:
    dual, again = control(), control()
    for kl in (0.5, 2.5, 1.0):
        dual.update(kl, 100)
    again.load(dual.as_json())
    for one in (dual, again):
        one.update(2.2, 100)
    assert again.coefficient == dual.coefficient
    assert again.as_json() == dual.as_json()


def last_half(config: PolicyConfig, *, seed: int, speed: float) -> float:
    """Mean KL of the second half against its target, for a policy whose KL follows the weight late and is seen with noise.

    Its resting KL falls by 0.28 nats when log beta rises by 1, from 1.3 at beta = 0.04, as that of the embedded model; each
    iteration it goes `speed` of the way, less and less as the learning rate falls; 128 replies give it with a noise of 15%.
    """
    control, rng, kl, seen = KLControl(config), random.Random(seed), 0.0, []
    for i in range(config.iterations):
        seen.append(kl * (1 + 0.15 * rng.gauss(0, 1)))
        resting = max(0.0, 1.3 - 0.28 * math.log(control.coefficient / 0.04))
        kl += min(1.0, speed * (1 - 0.9 * i / config.iterations)) * (resting - kl)
        control.update(seen[-1], 128)
    return fmean(seen[len(seen) // 2 :]) / config.kl_target


HOLDS: Mapping[str, Any] = {"iterations": 24, "kl_target": 0.8, "kl_coefficient": 0.1}


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.5])
def test_the_dual_weight_holds_a_target_below_where_the_policy_would_rest(speed: float) -> None:
    found = [last_half(PolicyConfig(**HOLDS), seed=seed, speed=speed) for seed in range(40)]
    assert sum(abs(ratio - 1) <= 0.1 for ratio in found) >= 38
    for other in ("adaptive", "fixed"):  # at the default horizon the weight moves by 1.3% an iteration
        missed = [last_half(PolicyConfig(**HOLDS, kl_control=other), seed=seed, speed=speed) for seed in range(40)]
        assert sum(abs(ratio - 1) > 0.1 for ratio in missed) >= 38


@pytest.mark.parametrize("kl_control", ["adaptive", "dual"])
@pytest.mark.parametrize("kl", [0.0, -50.0, 1e6])
def test_the_weight_stays_positive_for_any_horizon_and_any_kl(kl_control: str, kl: float) -> None:
    # The default batch is 128 replies: a horizon of 25 made the weight negative, and the policy was paid for its KL.
    controlled = control(kl_control=kl_control, kl_horizon=1, kl_rate=50.0)
    for _ in range(5000):
        controlled.update(kl, 128)
        assert 0 < controlled.coefficient < math.inf
