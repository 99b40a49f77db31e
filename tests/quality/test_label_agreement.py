"""Cohen's kappa against a table of counts, Krippendorff's alpha against published values, and their edge cases."""

from __future__ import annotations

import pytest

from selfeval.quality.label_agreement import cohen_kappa, krippendorff_alpha


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


PUBLISHED = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)
"""Krippendorff 2011, section C: four observers, twelve cases, five values; a dot is a missing label."""


def test_alpha_of_the_published_examples() -> None:
    raters = [[None if label == "." else label for label in row.split()] for row in PUBLISHED]
    figure = krippendorff_alpha(list(zip(*raters, strict=True)))
    assert figure.value == pytest.approx(0.743, abs=5e-4)
    assert figure.n == 11  # the last case has a single label
    assert figure.ci_low is not None
    assert figure.ci_low < 0.743
    # Section A: two observers, two values, ten cases.
    assert krippendorff_alpha(list(zip("0100000010", "1110010000", strict=True))).value == pytest.approx(0.095, abs=5e-4)


def test_alpha_of_equal_single_and_missing_labels() -> None:
    assert krippendorff_alpha([("a", "a"), ("b", "b")]).value == 1.0
    assert krippendorff_alpha([("a", "a"), ("a", "a")]).value is None
    assert krippendorff_alpha([("a", None), (None, None)]).n == 0
    # n_a = n_b = 2, n = 4: D_e = 2 · 2 · 2 / (4 · 3) = 2/3 and D_o = 1, so α = −1/2.
    assert krippendorff_alpha([("a", "b"), ("b", "a")]).value == pytest.approx(-0.5)
