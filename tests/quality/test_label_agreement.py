"""Cohen's kappa against a table of counts, and its edge cases."""

from __future__ import annotations

import pytest

from selfeval.quality.label_agreement import cohen_kappa


def test_kappa_of_a_known_table() -> None:
    # Counts: yes/yes 20, yes/no 5, no/yes 10, no/no 15. p_o = 35/50; p_e = 25/50 · 30/50 + 25/50 · 20/50 = 0.5; κ = 0.4.
    ours = ["yes"] * 25 + ["no"] * 25
    theirs = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    figure = cohen_kappa(ours, theirs)
    assert figure.value == pytest.approx(0.4)
    assert figure.n == 50
    # Fleiss, Cohen and Everitt 1969: the large-sample standard error is about 0.127, so the interval is about 0.15 to 0.65.
    assert figure.ci_low == pytest.approx(0.15, abs=0.05)
    assert figure.ci_high == pytest.approx(0.65, abs=0.05)


def test_kappa_of_equal_opposite_and_constant_labels() -> None:
    assert cohen_kappa("abab", "abab").value == 1.0
    assert cohen_kappa("abab", "baba").value == -1.0
    assert cohen_kappa("aaaa", "abab").value == 0.0
    assert cohen_kappa("aaaa", "aaaa").value is None
    assert cohen_kappa("", "").n == 0
    with pytest.raises(ValueError, match="got 1 and 2"):
        cohen_kappa("a", "ab")
