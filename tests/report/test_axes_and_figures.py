"""Scales, ticks and the writing of numbers, against values worked out by hand."""

from __future__ import annotations

import doctest
import importlib

import pytest

from selfeval.errors import InputError
from selfeval.report.axes import Scale, nice_range, nice_ticks, tick_text
from selfeval.report.figures import Figure, cells, describe, duration, read_figure, section, size


@pytest.mark.parametrize("name", ["axes", "charts", "figures", "sections"])
def test_examples_in_the_docstrings_hold(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"selfeval.report.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_scale_turns_round_for_the_upward_axis() -> None:
    upward = Scale(-1.0, 3.0, 200.0, 40.0)
    assert upward(-1.0) == 200.0
    assert upward(3.0) == 40.0
    assert upward(0.0) == 160.0  # a quarter of the way from 200 to 40


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 0.07, [0.0, 0.02, 0.04, 0.06]),  # 0.07 / 5 = 0.014, the next step is 0.02
        (-0.03, 0.02, [-0.03, -0.02, -0.01, 0.0, 0.01, 0.02]),
        (1.0, 60.0, [20.0, 40.0, 60.0]),  # 11.8 goes to 20, and 0 is outside
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_whole_ticks_never_split_a_step() -> None:
    assert nice_ticks(1.0, 3.0, whole=True) == [1.0, 2.0, 3.0]


def test_a_constant_series_gets_room_on_both_sides() -> None:
    low, high = nice_range(4.0, 4.0)
    assert low < 4.0 < high
    low, high = nice_range(0.0, 0.0)
    assert low < 0.0 < high


def test_tick_text_keeps_the_decimals_of_the_step() -> None:
    assert tick_text(0.02, 0.02) == "0.02"
    assert tick_text(-1.0, 0.5) == "-1.0"
    assert tick_text(2_000_000, 1_000_000) == "2M"


def test_a_figure_without_value_is_not_zero() -> None:
    report = {"policy": {"win_rate": {"value": None, "ci_low": None, "ci_high": None, "n": 0}, "kl": None}}
    assert read_figure(report, "policy.win_rate") is None
    assert read_figure(report, "policy.kl") is None
    assert read_figure(report, "evaluator.accuracy_gold") is None
    assert describe(None) == "not measured"
    assert cells(None) == ("not measured", "", "")


def test_not_a_number_is_not_a_figure() -> None:
    report = {"policy": {"kl": {"value": float("nan"), "ci_low": 0.0, "ci_high": 1.0, "n": 3}}}
    assert read_figure(report, "policy.kl") is None


def test_a_figure_without_interval_says_so() -> None:
    assert describe(Figure(0.5, None, None, 3)) == "50.0% (no interval, n = 3)"


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(InputError, match="'policy' should be an object, got list"):
        section({"policy": []}, "policy")
    with pytest.raises(InputError, match=r"'policy\.kl' should have value"):
        read_figure({"policy": {"kl": {"mean": 3}}}, "policy.kl")


def test_units() -> None:
    assert duration(59.94) == "59.9 s"
    assert duration(59.97) == "1 min 00 s"
    assert duration(3599.6) == "1 h 00 min"
    assert size(1024) == "1.00 KiB"
    assert size(900_000_000) == "858 MiB"
    assert size(5 * 2**40) == "5,120 GiB"
