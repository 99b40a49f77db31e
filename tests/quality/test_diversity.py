from __future__ import annotations

import pytest

from selfeval.quality.diversity import distinct_n


def test_distinct_n_counts_over_all_texts() -> None:
    texts = ["The cat sat.", "the cat ran!"]
    assert distinct_n(texts, 1) == 4 / 6  # the cat sat ran, of 6 words
    assert distinct_n(texts, 2) == 3 / 4  # "the cat" twice; no bigram runs from one text into the next
    assert distinct_n(texts, 3) == 1.0
    assert distinct_n(["我爱我爱"], 2) == 2 / 3  # 我爱 爱我 我爱


def test_nothing_to_count_is_none() -> None:
    assert distinct_n([], 2) is None
    assert distinct_n(["one", "two"], 2) is None
    with pytest.raises(ValueError, match="positive"):
        distinct_n(["a"], 0)
