from __future__ import annotations

import pytest

from selfeval.judging.loops import ends_in_loop


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, *[5] * 16], True),
        ([1, 2, *[5] * 15], False),  # shorter than 16 tokens
        ([1, *[4, 5, 6, 7, 8, 9] * 3], True),
        ([1, *[4, 5, 6, 7, 8, 9] * 2, 4, 5, 6, 7, 8], False),  # two copies and the start of the third, but 17 tokens of 18
        ([*[4, 5, 6] * 6, 4], True),  # the last copy is incomplete
        ([*[4, 5, 6] * 6, 1], False),  # it left the loop
        ([part for i in range(20) for part in (7, 8, i)], False),  # a list that counts up
        (list(range(40)) * 3, True),  # a long block
        (list(range(40)) * 2, False),
        ([], False),
    ],
)
def test_a_loop_is_three_copies_of_a_block_at_the_end(ids: list[int], expected: bool) -> None:
    assert ends_in_loop(ids) is expected
