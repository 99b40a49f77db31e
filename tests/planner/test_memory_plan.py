from __future__ import annotations

import pytest

from selfeval.planner.memory_plan import at_depth, largest_fitting


def test_depth_adds_the_same_for_every_layer() -> None:
    # 10 + 3 a layer, from 2 layers to 10; a kind that is there in the deeper one alone starts at 0.
    assert at_depth({"a": 16}, [{"a": 19, "b": 1}], [8]) == {"a": 40, "b": 8}


def test_every_span_of_layers_adds_its_own() -> None:
    # 10 + 3 a layer here + 5 a layer there; (2, 2) is 26, and (4, 1) is 10 + 12 + 5.
    assert at_depth({"a": 26}, [{"a": 29}, {"a": 31}], [2, -1]) == {"a": 27}


@pytest.mark.parametrize("budget", range(0, 1200, 7))
def test_the_largest_that_fits(budget: int) -> None:
    def measure(n: int) -> int:
        return 100 + 10 * n + min(n, 20) * 9  # grows fast, then slowly

    by_hand = max((n for n in range(1, 65) if measure(n) <= budget), default=0)
    assert largest_fitting(measure, 64, budget) == by_hand


def test_a_straight_measure_is_found_in_three_steps() -> None:
    asked = []

    def measure(n: int) -> int:
        asked.append(n)
        return 1000 + 37 * n

    assert largest_fitting(measure, 500, 1000 + 37 * 123 + 5) == 123
    assert asked == [500, 1, 123]


def test_what_grows_ever_faster_is_never_overfilled() -> None:
    for budget in range(1, 4000, 13):
        found = largest_fitting(lambda n: n * n, 60, budget)
        assert found * found <= budget
        assert (found > 0) == (budget >= 1)
