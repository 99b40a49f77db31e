"""Krippendorff's alpha against the published example and hand calculations."""

from __future__ import annotations

import pytest

from selfeval.quality.reliability import krippendorff_alpha

# Krippendorff 2011, section C: four observers, twelve units, 0 for a missing value.
OBSERVERS = ("123321412000", "123322412503", "033323422510", "123324412510")


def _labels(row: str) -> list[str | None]:
    return [None if label == "0" else label for label in row]


def test_the_published_example_has_its_alpha_and_leaves_out_the_unit_with_one_label() -> None:
    alpha = krippendorff_alpha([_labels(row) for row in OBSERVERS])
    assert alpha.known == pytest.approx(0.743, abs=5e-4)
    assert alpha.n == 11
    assert alpha.ci_low is not None
    assert alpha.ci_high is not None
    assert alpha.ci_low < 0.743 < alpha.ci_high <= 1


def test_systematic_disagreement_is_negative() -> None:
    # n = 4, n_c = 2 and 2: D_o = 1/4 (2 + 2) = 1, D_e = (16 - 8) / (4 * 3) = 2/3, alpha = 1 - 3/2.
    assert krippendorff_alpha([["A", "B"], ["B", "A"]]).known == pytest.approx(-0.5)


def test_one_label_only_has_no_alpha() -> None:
    alpha = krippendorff_alpha([["A", "A"], ["A", "A"]])
    assert (alpha.value, alpha.ci_low, alpha.n) == (None, None, 2)


@pytest.mark.parametrize("judges", [[["A"]], [["A", "B"], ["A"]]])
def test_judges_that_cannot_be_compared_are_refused(judges: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="at least 2 judges"):
        krippendorff_alpha(judges)


def test_units_without_two_labels_have_no_alpha() -> None:
    alpha = krippendorff_alpha([["A", None], [None, "B"]])
    assert (alpha.value, alpha.n) == (None, 0)
