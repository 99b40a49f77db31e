from __future__ import annotations

import pytest

from selfeval.quality.reply_diversity import measure_diversity


def test_figures_are_means_over_questions() -> None:
    # First question: words a b c | a b d. Distinct words 4 of 6, bigrams ab bc bd 3 of 4, overlap 2 / 4.
    # Second question: equal replies. Distinct words 3 of 6, bigrams 2 of 4, overlap 1.
    found = measure_diversity([["A b c.", "a b, d"], ["One two three", "one two THREE!"], ["alone"], []])
    assert found.distinct_1.value == pytest.approx((4 / 6 + 1 / 2) / 2)
    assert found.distinct_2.value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert found.overlap.value == pytest.approx((1 / 2 + 1) / 2)
    assert found.identical.value == 0.5
    assert found.distinct_1.n == found.overlap.n == 2


def test_all_pairs_of_a_question_count() -> None:
    found = measure_diversity([["a b", "a b", "c d"]])
    assert found.identical.value == pytest.approx(1 / 3)
    assert found.overlap.value == pytest.approx(1 / 3)


def test_word_order_makes_replies_different() -> None:
    found = measure_diversity([["Tom beats Ann", "Ann beats Tom"]])
    assert (found.identical.value, found.overlap.value) == (0.0, 1.0)


def test_without_two_replies_there_is_no_figure() -> None:
    assert measure_diversity([["one"], []]).means() == {}
    assert measure_diversity([["", ""]]).means() == {"overlap": 1.0, "identical": 1.0}  # no words, so no n-grams
