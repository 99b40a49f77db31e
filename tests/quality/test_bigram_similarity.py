from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations, pairwise

import pytest

from selfeval.quality.bigram_similarity import bigram_similarity


def pairs_compared(replies: list[list[tuple[int, ...]]]) -> float:
    """The definition: the cosine of the counts of each pair of questions."""
    counts = [Counter(b for ids in group for b in pairwise((-1, *ids))) for group in replies]

    def cosine(a: Counter[tuple[int, int]], b: Counter[tuple[int, int]]) -> float:
        lengths = [math.sqrt(sum(v * v for v in c.values())) for c in (a, b)]
        return sum(a[key] * b[key] for key in a) / (lengths[0] * lengths[1])

    found = [cosine(a, b) for a, b in combinations(counts, 2)]
    return sum(found) / len(found)


def test_it_is_the_mean_cosine_over_all_pairs_of_questions() -> None:
    rng = random.Random(0)
    replies = [[tuple(rng.randrange(6) for _ in range(rng.randint(1, 8))) for _ in range(3)] for _ in range(9)]
    assert bigram_similarity(replies) == pytest.approx(pairs_compared(replies))


def test_replies_of_one_question_may_be_equal_without_raising_it() -> None:
    assert bigram_similarity([[(1, 2)] * 5, [(3, 4)] * 5]) == 0.0
    assert bigram_similarity([[(1, 2)] * 5, [(1, 2)]]) == pytest.approx(1.0)


def test_replies_of_one_token_and_single_questions() -> None:
    assert bigram_similarity([[(7,)], [(7,)], [(8,)]]) == pytest.approx(1 / 3)  # one of three pairs is equal
    assert bigram_similarity([[(1, 2)]]) is None
