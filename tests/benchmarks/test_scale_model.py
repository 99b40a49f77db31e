"""The formula of a run on many workers, and the simulation that checks it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scale_formula as formula
import scale_simulation as simulation
import scale_work as work
from scale_formula import NONE, Alone, Chance, Map, Phase, Training
from scale_hardware import GPUS, MODELS, SETUPS, Assumed, costs_on
from scale_work import Costs, Load

from selfeval.config import RunConfig
from selfeval.planner.model_configs import model_facts, weigh
from selfeval.planner.stage_times import Lengths, stage_tokens

LENGTHS = Lengths(ask=350, reply_prompt=60, grade=60, grade_alone=60, judge=350, question=40, reply=100, reasoning=100)
TRAINING = Training("training", 23, (Phase(5.0, 0.25), Phase(1.0)), every=5, checkpoint=3.0)
FREE = Costs(0.01, 0.002, 0.05, 1e-4, 0.1, 3e-4, 0.02, 0.0, 0.0, 5.0, 1.0, 4e6)
"""Costs of a worker whose messages take no time."""


# -- the largest of several ---------------------------------------------------------------------------------------------


def test_the_longest_of_two_has_a_closed_form() -> None:
    """E max(X, Y) = 2 Phi(sigma / sqrt 2) for independent log-normal variables with mean 1, 2 Phi(x) = 1 + erf(x / sqrt 2)."""
    for cv in (0.05, 0.3, 1.0):
        sigma = math.sqrt(math.log(1 + cv**2))
        assert formula.longest(2, cv) == pytest.approx(1 + math.erf(sigma / 2), rel=1e-9)


def test_the_longest_of_many_is_that_of_random_numbers() -> None:
    sigma = formula.sigma_of(0.4)
    drawn = np.exp(sigma * np.random.default_rng(0).standard_normal((20_000, 64)) - sigma**2 / 2)
    assert drawn.std() == pytest.approx(0.4, rel=0.01)
    assert formula.longest(64, 0.4) == pytest.approx(drawn.max(axis=1).mean(), rel=0.01)


# -- without chance, formula and simulation are the same ----------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 7, 64])
@pytest.mark.parametrize("shards", [1, 6, 7, 8, 63, 200])
@pytest.mark.parametrize("driver", [0.0, 0.03, 0.5])
def test_map_equals_the_simulation(shards: int, workers: int, driver: float) -> None:
    """With 0.5 s for each of 64 shards of 10 s, the driver is the limit."""
    part = Map("map", shards, 10.0, driver)
    assert formula.map_seconds(part, workers) == pytest.approx(simulation.simulate_map(part, workers, NONE, 0), rel=1e-9)


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("every", [1, 5, 23, 100])
def test_training_equals_the_simulation(every: int, workers: int) -> None:
    part = replace(TRAINING, every=every)
    expected = formula.training_seconds(part, workers)
    assert expected == pytest.approx(simulation.simulate_training(part, workers, NONE, 0), rel=1e-9)


@pytest.mark.parametrize("workers", [1, 8, 100])
def test_a_whole_run_equals_the_simulation(workers: int) -> None:
    parts = work.parts_of(Load("default", RunConfig(), LENGTHS), FREE, workers)
    expected = formula.run_seconds(parts, workers)
    assert expected == pytest.approx(simulation.simulate_run(parts, workers, NONE, 0), rel=1e-9)


def test_one_worker_takes_the_sum_of_all_work() -> None:
    """8 shards of (10 + 0) s, 23 iterations of 6.25 s with 4 checkpoints of 3 s (none after the last), and 2 s alone."""
    parts = (Map("map", 8, 10.0), TRAINING, Alone("alone", 2.0))
    assert formula.run_seconds(parts, 1) == pytest.approx(80 + 23 * 6.25 + 4 * 3 + 2, rel=1e-12)


def test_a_driver_that_is_too_slow_is_the_limit() -> None:
    """64 workers, 640 shards of 10 s, 1 s each in the driver: the first result after 10 s, then one per second."""
    assert formula.map_seconds(Map("map", 640, 10.0, 1.0), 64) == pytest.approx(10 + 640, rel=1e-12)


# -- with chance, they agree --------------------------------------------------------------------------------------------

CASES = {
    "spread": (Chance(work=0.2, machine=0.1), 0.05),
    "stragglers": (Chance(work=0.2, machine=1.0), 0.2),
    "stragglers, repeated": (Chance(work=0.2, machine=1.0, slow=3.0), 0.2),
    "losses": (Chance(work=0.2, machine=0.1, losses=1e-4, replace=60.0, restart=60.0), 0.06),
}
"""The most by which formula and simulation differ: the formula takes starts and rests of shards as independent."""


@pytest.mark.parametrize("name", CASES)
def test_map_agrees_with_the_simulation(name: str) -> None:
    chance, most = CASES[name]
    part = Map("map", 40, 60.0, 0.01)
    found = np.mean([simulation.simulate_map(part, 8, chance, seed) for seed in range(60)])
    assert formula.map_seconds(part, 8, chance) == pytest.approx(found, rel=most)


@pytest.mark.parametrize("workers", [1, 8])
def test_many_shards_per_worker_take_the_sum_of_their_work(workers: int) -> None:
    """200 waves: 200 * 60 s, and less than two shards for the end."""
    for spread in (0.05, 0.5):
        found = formula.map_seconds(Map("map", 200 * workers, 60.0), workers, Chance(work=spread, machine=0.05, slow=3.0))
        assert 200 * 60.0 * 0.995 <= found <= 202 * 60.0


@pytest.mark.parametrize("name", CASES)
def test_training_agrees_with_the_simulation(name: str) -> None:
    chance, _ = CASES[name]
    found = np.mean([simulation.simulate_training(TRAINING, 16, chance, seed) for seed in range(60)])
    assert formula.training_seconds(TRAINING, 16, chance) == pytest.approx(found, rel=0.03)


def test_repeats_of_slow_shards_save_time() -> None:
    slow = Chance(work=0.2, machine=1.0)
    part = Map("map", 40, 60.0)
    for seconds in (formula.map_seconds, lambda p, w, c: np.mean([simulation.simulate_map(p, w, c, s) for s in range(30)])):
        assert seconds(part, 8, replace(slow, slow=3.0)) < 0.95 * seconds(part, 8, slow)


def test_a_shard_of_a_lost_worker_is_computed_again() -> None:
    """One worker, one shard of 10 s, a loss per 20 s: like a segment of training, M e^(R / M) (e^(10 / M) - 1) on average."""
    chance = Chance(losses=1 / 20, replace=4.0, restart=4.0)
    found = np.mean([simulation.simulate_map(Map("map", 1, 10.0), 1, chance, seed) for seed in range(4000)])
    # A worker that is being replaced cannot be lost again, so R is added as it is: (e^(10 / 20) - 1) (20 + 4).
    assert found == pytest.approx(math.expm1(0.5) * 24, rel=0.04)


# -- messages and checkpoints -------------------------------------------------------------------------------------------


def test_all_reduce_of_known_numbers() -> None:
    """160 MB on 8 workers at 10 Gbit/s: 2 * 7 / 8 * 160e6 / 1.25e9 = 0.224 s, and 14 messages of 1 ms."""
    assert formula.all_reduce_seconds(160e6, 8, 1.25e9, 0.0) == pytest.approx(0.224, rel=1e-12)
    assert formula.all_reduce_seconds(160e6, 8, 1.25e9, 1e-3) == pytest.approx(0.238, rel=1e-12)
    assert formula.all_reduce_seconds(160e6, 1, 1.25e9, 1e-3) == 0.0


@pytest.mark.parametrize(("checkpoint", "between"), [(3.0, 360_000.0), (15.0, 3600.0), (60.0, 1800.0)])
def test_the_interval_of_daly_is_the_best_one(checkpoint: float, between: float) -> None:
    """The expected time per second of work, (e^((work + checkpoint) / M) - 1) / work, minimised on a fine grid."""
    works = np.geomspace(checkpoint / 10, 10 * between, 400_000)
    best = works[np.argmin(np.expm1((works + checkpoint) / between) / works)]
    assert formula.daly_interval(checkpoint, between) == pytest.approx(best, rel=0.01)


def test_segments_without_losses_take_their_time() -> None:
    assert formula.segment_seconds(100.0, 8, NONE) == 100.0
    # M = 1000 / 8 = 125 s: 125 e^(5 / 125) (e^(100 / 125) - 1).
    chance = Chance(losses=1e-3, restart=5.0)
    assert formula.segment_seconds(100.0, 8, chance) == pytest.approx(125 * math.exp(0.04) * math.expm1(0.8), rel=1e-12)


def test_amdahl() -> None:
    """A tenth of the work is serial: 1 / (0.1 + 0.9 / 9) = 5 on 9 workers."""
    assert formula.amdahl(0.1, 9) == pytest.approx(5.0, rel=1e-12)


# -- counts of a run ----------------------------------------------------------------------------------------------------


def _tokens(part: str, **rate: float) -> float:
    """Return the tokens of a part on one worker: its time if only one rate costs anything, 1 s per token."""
    costs = Costs(**{**dict.fromkeys(("step", "row", "reading", "read", "learning", "learn"), 0.0), **rate}, **_NOTHING)
    found = next(found for found in work.parts_of(Load("default", RunConfig(), LENGTHS), costs, 1) if found.name == part)
    return formula.seconds_of(found, 1)


_NOTHING: dict[str, Any] = {"optimizer": 0, "handled": 0, "driver": 0, "start": 0, "save": 0, "gradients": 0}


@pytest.mark.parametrize("stage", ["questions", "replies", "verdicts", "policy"])
def test_sampled_tokens_are_those_of_the_planner(stage: str) -> None:
    planned = stage_tokens(RunConfig(), LENGTHS, reference=False, layers=32)[stage]
    assert _tokens(stage, row=1.0) == pytest.approx(planned.written, rel=1e-9)


def test_learned_tokens_are_those_of_the_planner() -> None:
    """The planner counts the prompt with each reply; here the replies to a question share it, as in training."""
    planned = stage_tokens(RunConfig(), LENGTHS, reference=False, layers=32)
    policy, evaluator = RunConfig().policy, RunConfig().evaluator
    replies = policy.iterations * policy.questions_per_iteration * policy.replies_per_question
    saved = 2 * policy.epochs * replies * LENGTHS.grade * (1 - 1 / policy.replies_per_question)
    assert _tokens("policy", learn=1.0) == pytest.approx(planned["policy"].learned - saved, rel=1e-9)
    steps = evaluator.epochs * math.ceil(RunConfig().questions.train * (1 - evaluator.held_out) / evaluator.batch)
    assert _tokens("evaluator", learn=1.0) == steps * evaluator.batch * (LENGTHS.grade + 2 * LENGTHS.reply)


def test_a_batch_divides_until_each_worker_has_one_reply() -> None:
    """Learning from 64 replies per step: 512 workers are not faster than 64, and pay for more messages."""
    load, costs = Load("default", RunConfig(), LENGTHS), replace(FREE, bandwidth=1e10, latency=1e-5)
    parts = {workers: work.policy_part(load, costs, workers).phases[-1] for workers in (1, 16, 64, 512)}
    assert parts[1].share > parts[16].share > parts[64].share == parts[512].share
    assert parts[512].common > parts[64].common > parts[1].common


# -- hardware -----------------------------------------------------------------------------------------------------------


def test_sizes_of_the_models() -> None:
    """The first by the planner, from the same published config and another rule; the second as its model card counts it."""
    assert MODELS[0].parameters == weigh(model_facts("mistralai/Mistral-7B-Instruct-v0.3"), "fp32").numbers
    assert MODELS[1].parameters == 70_553_706_496
    assert MODELS[0].adapter(16) == 41_943_040


def test_costs_of_a_gpu_by_hand() -> None:
    """7B on an H100: 14.5 GB at 0.6 of 3.35 TB/s are 7.2 ms, and 32 layers of 0.5 ms are 16 ms."""
    costs = costs_on(GPUS[1], SETUPS[0], Assumed(), LENGTHS, 8, driver=0.0, handled=0.0)
    parameters = MODELS[0].parameters
    assert costs.step == pytest.approx(0.016 + 2 * parameters / (0.6 * 3.35e12), rel=1e-12)
    assert costs.learn == pytest.approx(4 * parameters / (0.4 * 989.5e12), rel=1e-12)
    assert costs.gradients == 4 * 41_943_040
    # Nine workers do not fit one machine.
    assert (costs.bandwidth, costs_on(GPUS[1], SETUPS[0], Assumed(), LENGTHS, 9, driver=0, handled=0).bandwidth) == (
        450e9,
        50e9,
    )


def test_every_model_fits_its_cards() -> None:
    for setup in SETUPS:
        assert setup.weights < 0.6 * setup.cards * GPUS[0].memory
