"""The choice of a representation without labels."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from selfeval.quality.embeddings.selection import drop_words, evenly_spaced, view_agreement


def test_agreement_is_the_log_probability_of_the_own_view() -> None:
    # Cosines 1 and 0.9 for both texts: log(e^20 / (e^20 + e^18)) = -log(1 + e^-2).
    first = np.array([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]], np.float32)
    assert view_agreement(first, first) == pytest.approx(-math.log(1 + math.exp(-2)), abs=1e-5)
    # The other text is taken for the own view: log(e^18 / (e^20 + e^18)).
    assert view_agreement(first, first[::-1]) == pytest.approx(-math.log(1 + math.exp(2)), abs=1e-5)


def test_views_drop_words_and_chinese_characters() -> None:
    text = " ".join(f"w{n}" for n in range(1000))
    kept = drop_words(text, Random(0)).split()
    assert 650 < len(kept) < 750
    assert set(kept) < set(text.split())
    chinese = "小明有三个苹果，吃了一个" * 20
    view = drop_words(chinese, Random(0))
    assert 0.6 * len(chinese) < len(view) < 0.8 * len(chinese)
    assert " " not in view


def test_a_view_is_never_empty() -> None:
    assert all(drop_words("x", Random(seed)) == "x" for seed in range(20))


def test_a_sample_is_spread_over_the_texts() -> None:
    assert evenly_spaced(["a", " ", "b", "a", "c", "d"], 2) == ["a", "c"]
    assert evenly_spaced(["a", "b"], 5) == ["a", "b"]
