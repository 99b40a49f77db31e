from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfeval.training.pair_order import epoch_length, epoch_order

EXCESS = [3] * 20 + [-2] * 6 + [0] * 5


def test_the_plain_order_is_a_shuffle_that_depends_on_the_seed() -> None:
    order = epoch_order(EXCESS, seed="0", balanced=False)
    assert sorted(order) == list(range(31))
    assert order == epoch_order(EXCESS, seed="0", balanced=False)
    assert order != epoch_order(EXCESS, seed="1", balanced=False)


@pytest.mark.parametrize("batch", [1, 4, 7, 16])
def test_longer_and_shorter_chosen_replies_are_balanced_in_every_batch(batch: int) -> None:
    order = epoch_order(EXCESS, seed="0", balanced=True)
    for start in range(0, len(order), batch):
        signs = [(EXCESS[i] > 0) - (EXCESS[i] < 0) for i in order[start : start + batch]]
        assert abs(sum(signs)) <= 1


def test_the_smaller_group_is_repeated_evenly_and_no_pair_is_lost() -> None:
    counts = Counter(epoch_order(EXCESS, seed="0", balanced=True))
    assert set(counts) == set(range(31))
    assert {counts[i] for i in range(20)} == {counts[i] for i in range(26, 31)} == {1}
    assert sorted(counts[i] for i in range(20, 26)) == [3, 3, 3, 3, 4, 4]


@given(st.lists(st.integers(-2, 2), max_size=30), st.booleans())
def test_the_length_of_an_epoch_is_that_of_its_order(excess: list[int], balanced: bool) -> None:
    order = epoch_order(excess, seed="0", balanced=balanced)
    assert len(order) == epoch_length(excess, balanced=balanced)
    assert set(order) == set(range(len(excess)))


def test_without_one_of_the_groups_nothing_is_balanced() -> None:
    assert epoch_order([1, 2, 0], seed="0", balanced=True) == epoch_order([1, 2, 0], seed="0", balanced=False)
