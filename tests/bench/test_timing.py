"""Turns, medians, rates and ratios, with times that are known."""

from __future__ import annotations

import time

import pytest
import torch

from selfeval.bench.timing import Comparison, Seconds, Side, SideTimes, take_turns, timed


def _side(group: str, seconds: list[float], turns: list[str]) -> Side:
    left = iter(seconds)

    def run() -> Seconds:
        turns.append(group)
        spent = next(left)
        return Seconds(spent, 2 * spent)

    return Side(group, "", run)  # type: ignore[arg-type]


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    turns: list[str] = []
    sides = [_side("ours", [9.0, 1.0, 3.0], turns), _side("limit", [8.0, 0.5, 0.25], turns)]
    ours, limit = take_turns(sides, rounds=2)
    assert turns == ["ours", "limit"] * 3
    assert ours.values("cpu") == [1.0, 3.0]
    assert limit.values("wall") == [1.0, 0.5]


def test_without_a_warm_up_every_round_counts() -> None:
    turns: list[str] = []
    (ours,) = take_turns([_side("ours", [9.0, 1.0], turns)], rounds=2, warm_up=False)
    assert ours.values("cpu") == [9.0, 1.0]


def _comparison(measure: str = "cpu") -> Comparison:
    def times(group: str, setting: str, *cpu: float) -> SideTimes:
        return SideTimes(group, setting, tuple(Seconds(s, 10 - s) for s in cpu))  # type: ignore[arg-type]

    sides = (
        times("ours", "", 2.0, 1.0, 4.0),
        times("hugging_face", "batch 32", 8.0, 5.0, 6.0),
        times("hugging_face", "batch 64", 3.0, 9.0, 5.0),
        times("limit", "", 0.5, 0.5, 0.25),
    )
    return Comparison("sampling", "tokens", 100, measure, sides)  # type: ignore[arg-type]


def test_rates_and_ratios_are_those_of_the_medians() -> None:
    found = _comparison().as_json()["sides"]
    # Medians of the CPU seconds: 2, 6, 5 and 0.5.
    assert [side["cpu_seconds"]["median"] for side in found] == [2.0, 6.0, 5.0, 0.5]
    assert [side["rate"] for side in found] == [50.0, pytest.approx(100 / 6), 20.0, 200.0]
    assert [side["ratio_to_ours"] for side in found] == [1.0, 3.0, 2.5, 0.25]
    assert [side["best"] for side in found] == [True, False, True, True]
    assert found[0]["cpu_seconds"] == {"median": 2.0, "lowest": 1.0, "highest": 4.0, "rounds": [2.0, 1.0, 4.0]}


def test_wall_seconds_count_where_they_are_the_measure() -> None:
    found = _comparison("wall").as_json()["sides"]
    # Wall seconds are 10 minus the CPU seconds: medians 8, 4, 5 and 9.5.
    assert [side["ratio_to_ours"] for side in found] == [1.0, 0.5, 0.625, 9.5 / 8]
    assert [side["best"] for side in found] == [True, True, False, True]


def test_waiting_takes_wall_time_and_no_cpu_time() -> None:
    spent = timed(lambda: time.sleep(0.2), torch.device("cpu"))
    assert spent.wall >= 0.2
    assert spent.cpu < 0.1
