from __future__ import annotations

import random

import pytest

from selfeval.quality.reply_loops import Loop, find_loop


def covered(ids: list[int], block: int) -> int:
    """Number of tokens at the end with period `block`, counted one by one."""
    length = block
    while length < len(ids) and ids[-1 - length] == ids[-1 - length + block]:
        length += 1
    return length


@pytest.mark.parametrize("block", [1, 2, 7, 30])
def test_a_block_that_repeats_until_the_limit_is_a_loop(block: int) -> None:
    copies = list(range(100, 100 + block)) * (40 // block + 4)
    assert find_loop([1, 2, 3, *copies], finished=False) == Loop(block, len(copies))


def test_the_last_copy_may_be_incomplete() -> None:
    assert find_loop([*[1, 2, 3, 4, 5] * 5, 1, 2], finished=False) == Loop(5, 27)


def test_a_reply_that_ends_is_no_loop() -> None:
    laugh = [8] * 200
    assert find_loop(laugh, finished=True) is None
    assert find_loop(laugh, finished=False) == Loop(1, 200)


def test_a_short_a_late_and_a_rare_repetition_are_no_loops() -> None:
    assert find_loop([5] * 23, finished=False) is None  # the rule of a table: fewer than 24 tokens
    assert find_loop([5] * 24, finished=False) == Loop(1, 24)
    text = list(range(1000, 1061))
    assert find_loop([*text, *[5] * 40], finished=False) is None  # 40 of 101 tokens: less than 40 %
    assert find_loop([*text[:-1], *[5] * 40], finished=False) == Loop(1, 40)
    assert find_loop(list(range(20)) * 3, finished=False) is None  # three copies
    assert find_loop(list(range(20)) * 4, finished=False) == Loop(20, 80)


def test_a_list_that_counts_up_a_table_and_code_are_no_loops() -> None:
    lists = [token for n in range(60) for token in (50, n, 51, 52, 53)]
    assert find_loop(lists, finished=False) is None
    rng = random.Random(0)
    table = [token for _ in range(60) for token in (9, rng.randrange(3), 9, rng.randrange(3), 9, 10)]
    assert find_loop(table, finished=False) is None


def test_it_finds_the_loops_that_a_search_over_all_blocks_finds() -> None:
    rng, found = random.Random(1), 0
    for _ in range(300):
        block = [rng.randrange(3) for _ in range(rng.randrange(1, 12))]
        ids = [rng.randrange(3) for _ in range(rng.randrange(40))] + (block * 40)[: rng.randrange(10, 90)]
        expected = next(
            (Loop(p, n) for p in range(1, len(ids) // 4 + 1) if (n := covered(ids, p)) >= max(4 * p, 24, 0.4 * len(ids))), None
        )
        assert find_loop(ids, finished=False) == expected
        found += expected is not None
    assert 50 < found < 290
