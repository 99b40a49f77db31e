from __future__ import annotations

import pytest

from selfeval.backbone.plan import at_depth, largest_fitting


def test_depth_adds_the_same_for_every_layer() -> None:
    # 10 + 3 a layer; a kind that is there in the deeper one alone starts at -2 * 1.
    assert at_depth({"a": 16}, {"a": 19, "b": 1}, (2, 3), 10) == {"a": 40, "b": 8}


@pytest.mark.parametrize("budget", range(0, 1200, 7))
def test_the_largest_that_fits(budget: int) -> None:
    def measure(n: int) -> int:
        return 100 + 10 * n + min(n, 20) * 9  # grows fast, then slowly

    by_hand = max((n for n in range(1, 65) if measure(n) <= budget), default=0)
    assert largest_fitting(measure, 64, budget) == by_hand


def test_no_budget_is_no_limit() -> None:
    assert largest_fitting(lambda n: n, 64, None) == 64
