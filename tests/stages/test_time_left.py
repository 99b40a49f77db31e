from __future__ import annotations

import math
from itertools import pairwise

import pytest

from selfeval.stages.time_left import TimeLeft, in_words


def _steady(left: TimeLeft, first: int, count: int, now: float, seconds: float) -> float:
    """Finish `count` units, one every `seconds`; return the time."""
    for done in range(first + 1, first + count + 1):
        now += seconds
        left.update(done, now)
    return now


def test_a_steady_pace_gives_the_exact_time_and_counts_down() -> None:
    left = TimeLeft(100, 20, 1000.0)
    assert left.seconds(1002) is None, "nothing is known before the first unit"
    now = _steady(left, 20, 20, 1000.0, 2.0)
    # 60 units are left, of 2 s each; the 20 of an earlier process say nothing about the speed
    assert left.seconds(now) == pytest.approx(120)
    assert left.seconds(now + 1.5) == pytest.approx(118.5)
    assert left.rate == pytest.approx(0.5)


def test_recent_units_weigh_more() -> None:
    left = TimeLeft(1000, 0, 0.0)
    now = _steady(left, 0, 100, 0.0, 1.0)
    now = _steady(left, 100, 100, now, 4.0)
    # By hand: with one unit every a s for a long time, 400 s at 4 s after 100 s at 1 s. The weight of the first phase is
    # below exp(-400/60) = 0.0013, so the rate is that of the second within 1 %, where the mean of all would give 2.5 s.
    assert left.seconds(now) == pytest.approx(800 * 4.0, rel=0.01)


def test_a_busy_minute_moves_the_estimate_gradually_and_is_forgotten() -> None:
    left, now = TimeLeft(1000, 0, 0.0), 0.0
    shown: list[float] = []
    truth: list[float] = []
    done = 0
    for second in range(1, 900):
        # One unit a second; between 300 s and 360 s the machine is five times slower.
        now = float(second)
        if not 300 <= second < 360 or second % 5 == 0:
            done += 1
            left.update(done, now)
        shown.append(left.seconds(now) or math.nan)
        truth.append(1000 - done + (48 if second < 300 else 0))
    jumps = [abs(b - a) for a, b in pairwise(shown[10:])]
    # 652 units are left at 348 s: the estimate may move by at most 5 % of it in a second, where that of the last unit alone
    # would jump from 700 s to 3,500 s.
    assert max(jumps) < 0.05 * 700
    assert max(shown[300:360]) < 3 * 700
    assert shown[600] == pytest.approx(truth[600], rel=0.05), "four minutes later it is forgotten"


def test_a_late_unit_makes_the_estimate_grow() -> None:
    left = TimeLeft(20, 0, 0.0)
    now = _steady(left, 0, 10, 0.0, 10.0)
    assert left.seconds(now + 10) == pytest.approx(90)
    late = [left.seconds(now + 10 + wait) or 0.0 for wait in (0, 20, 40)]
    assert late == sorted(late)
    assert late[2] > 110


def test_slow_units_are_averaged_too() -> None:
    left, now = TimeLeft(40, 0, 0.0), 0.0
    for done in range(1, 21):
        now += 400 if done % 2 else 200  # far longer than the memory of a minute
        left.update(done, now)
    # With a memory of one unit the estimate would be 20 units of 200 s.
    assert left.seconds(now) == pytest.approx(20 * 300, rel=0.1)


def test_a_roll_back_moves_the_rest_and_not_the_pace() -> None:
    left = TimeLeft(20, 0, 0.0)
    now = _steady(left, 0, 10, 0.0, 5.0)
    left.update(6, now + 100)
    assert left.seconds(now + 100) == pytest.approx(14 * 5)


def test_the_words_do_not_flicker() -> None:
    left = TimeLeft(600, 0, 0.0)
    now = _steady(left, 0, 60, 0.0, 1.0)
    assert left.words(now) == "about 9 min"
    now = _steady(left, 60, 36, now, 1.0)
    assert left.words(now) == "about 9 min", "504 s would be 8 min, but half a minute is no news"
    now = _steady(left, 96, 10, now, 1.0)
    assert left.words(now) == "about 8 min"
    assert (left.seconds(now + 3) or 0) > 510, "back above the middle between 8 and 9 minutes"
    assert left.words(now + 3) == "about 8 min"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "about 10 s"), (34, "about 30 s"), (57, "about 1 min"), (200, "about 3 min"), (59.6 * 60, "about 1 h"),
     (75 * 60, "about 1 h 20 min"), (11 * 3600, "about 11 h")],
)  # fmt: skip
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
