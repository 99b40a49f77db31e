"""Scales, ticks and the writing of numbers, against values worked out by hand."""

from __future__ import annotations

import doctest
import importlib
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfeval.quality.statistics import Figure
from selfeval.report.axes import Scale, bounded, nice_range, nice_ticks, tick_text, widened
from selfeval.report.figures import cells, describe, duration, finite


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


ANY_NUMBER = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),  # denormals and ±1.8e308 included
    st.sampled_from([0.0, -0.0, 5e-324, 6e-14, 1e-300, 1e17, 1e300, sys.float_info.max, -sys.float_info.max]),
    st.floats(-1.0, 1.0),
)


@given(ANY_NUMBER, ANY_NUMBER)
def test_every_finite_range_gets_ticks_that_cover_it(one: float, other: float) -> None:
    low, high = nice_range(min(one, other), max(one, other))
    slack = 1e-8 * (high - low)  # a range within rounding of a tick keeps that tick
    assert math.isfinite(high - low)
    assert low < high
    assert low - slack <= bounded(min(one, other))
    assert bounded(max(one, other)) <= high + slack
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    step = ticks[1] - ticks[0]
    assert len({tick_text(tick, step) for tick in ticks}) == len(ticks)  # neighbouring labels differ


@given(ANY_NUMBER, ANY_NUMBER)
def test_every_finite_range_of_steps_can_be_divided(one: float, other: float) -> None:
    low, high = widened(min(one, other), max(one, other), room=1.0)
    assert low < high
    assert len(nice_ticks(low, high, whole=True)) <= 12
    assert 0.0 <= Scale(low, high, 0.0, 1.0)(bounded(one)) <= 1.0


def test_a_range_of_rounding_errors_keeps_its_digits() -> None:
    # An on-policy run: the KL of one update differs from 0 by float32 rounding. Rounded to 12 decimals it was (0, 0).
    assert nice_range(0.0, 6.2e-14) == pytest.approx((0.0, 8e-14), rel=1e-12, abs=0)  # 6.2e-14 / 5 goes to 2e-14
    assert nice_ticks(0.0, 8e-14) == pytest.approx([0.0, 2e-14, 4e-14, 6e-14, 8e-14], rel=1e-12, abs=0)
    assert [tick_text(k * 2e-14, 2e-14) for k in range(3)] == ["0", "2e-14", "4e-14"]


def test_whole_numbers_beyond_floats_are_not_finite() -> None:
    assert finite(10**400) is None
    assert finite(10**3) == 1000.0


def test_tick_text_keeps_the_decimals_of_the_step() -> None:
    assert tick_text(0.02, 0.02) == "0.02"
    assert tick_text(-1.0, 0.5) == "-1.0"
    assert tick_text(2_000_000, 1_000_000) == "2M"


def test_a_figure_without_value_is_not_zero() -> None:
    for absent in (None, Figure(None, None, None, 0)):
        assert describe(absent) == "not measured"
        assert cells(absent) == ("not measured", "", "")


def test_a_figure_without_interval_says_so() -> None:
    assert describe(Figure(0.5, None, None, 3)) == "50.0% (no interval, n = 3)"


def test_units() -> None:
    assert duration(59.94) == "59.9 s"
    assert duration(59.97) == "1 min 00 s"
    assert duration(3599.6) == "1 h 00 min"
