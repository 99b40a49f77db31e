from __future__ import annotations

import dataclasses

import pytest

from evidence_records import KEPT, TIE, UNPARSABLE, UNSURE, verdict, voted
from selfeval.evaluation.verdicts import label_is_right, measure_verdicts
from selfeval.records import PairwiseEvidence, SampledPairwiseEvidence, Unreadable, Verdict


@pytest.mark.parametrize(
    ("first", "second", "probability", "expected"),
    [
        pytest.param("1", "7", 0.9, True, id="chose the right one, shown first"),
        pytest.param("1", "7", 0.1, False, id="chose the wrong one, shown second"),
        pytest.param("7", "1", 0.1, True, id="chose the right one, shown second"),
        pytest.param("7", "1", 0.9, False, id="chose the wrong one, shown first"),
        pytest.param("1", "1", 0.9, False, id="both right: no right one over a wrong one"),
        pytest.param("7", "8", 0.1, False, id="both wrong"),
        pytest.param("1", "7", None, None, id="no verdict"),
        pytest.param("1", "7", 0.5, None, id="preferred neither, in a file of pairs"),
    ],
)
def test_a_label_is_right_when_it_chose_a_right_reply_over_a_wrong_one(
    first: str, second: str, probability: float | None, expected: bool | None
) -> None:
    assert label_is_right(verdict("q1", probability), (first == "1", second == "1")) is expected


def test_a_label_of_a_question_without_gold_is_neither_right_nor_wrong() -> None:
    for right in ((None, None), (None, True), (False, None)):
        assert label_is_right(verdict("love", 0.9), right) is None


def test_the_verdicts_figures_by_hand() -> None:
    verdicts = [
        verdict("q0", 0.85, in_order=0.9, swapped=0.8),  # consistent; kept, chose the first: right
        verdict("q1", 0.10, in_order=0.1, swapped=0.1),  # consistent; kept, chose the second: wrong
        verdict("q2", 0.55, UNSURE, in_order=0.9, swapped=0.2),  # inconsistent
        verdict("q3", 0.45, UNSURE, in_order=0.2, swapped=0.7),  # inconsistent
        verdict("q4", 0.50, TIE, in_order=0.51, swapped=0.49, tie=0.8, ties=(0.8, 0.8)),  # consistent: neither, both times
        verdict("q5", None, UNPARSABLE, in_order=0.9, swapped=None, ties=(0.0, None)),  # not asked: one order did not parse
        verdict("q6", None, UNPARSABLE, in_order=None, swapped=None),
        verdict("q7", 0.75, UNSURE, in_order=0.9, swapped=0.6, tie=0.35, ties=(0.1, 0.6)),  # inconsistent: first, neither
        verdict("q8", 0.50, TIE, in_order=0.48, swapped=0.52, tie=0.9, ties=(0.9, 0.9)),  # consistent, as q4
        verdict("love", 0.95, in_order=0.9, swapped=1.0),  # consistent; kept, no gold
    ]
    found = measure_verdicts(verdicts, [True, False, None], from_file=False)
    assert (found.judged, found.kept, found.tie, found.unsure, found.unparsable) == (10, 3, 2, 3, 2)
    assert (found.kept_share.value, found.kept_share.n) == (3 / 10, 10)
    # Both orders parsed 8 times (q0 to q4, q7, q8, love) and agreed 5 times; they are on the same side of 1/2 only 4 times.
    assert (found.swap_consistency.value, found.swap_consistency.n) == (5 / 8, 8)
    assert found.label_accuracy_gold is not None
    assert (found.label_accuracy_gold.value, found.label_accuracy_gold.n) == (0.5, 2)
    assert found.source == "judge"


def test_the_orders_of_a_judge_without_evidence_are_not_compared() -> None:
    alone = dataclasses.replace(verdict("q0", 0.9), evidence=None)
    found = measure_verdicts([alone, verdict("q1", 0.9)], None, from_file=False)
    assert (found.judged, found.kept, found.swap_consistency.n) == (2, 2, 1)


def unreadable(*causes: Unreadable | None) -> Verdict:
    """An unparsable verdict whose orders have these causes."""
    found = verdict("q1", None, UNPARSABLE)
    assert found.evidence is not None
    return dataclasses.replace(found, evidence=dataclasses.replace(found.evidence, causes=causes))


def test_orders_that_could_not_be_read_are_counted_by_cause() -> None:
    pairs = [
        unreadable(Unreadable.CUT, Unreadable.LOOP),
        unreadable(None, Unreadable.CUT),
        unreadable(Unreadable.LABEL_MASS, Unreadable.NO_ROOM),
    ]
    found = measure_verdicts([*pairs, verdict()], None, from_file=False).unreadable_orders
    assert found.as_json() == {
        "cut": 2,
        "loop": 1,
        "label_mass": 1,
        "no_room": 1,
        "no_lead": 0,
        "no_answer": 0,
        "truncated": 0,
        "refused": 0,
    }


def test_the_mean_share_of_the_majority_is_over_the_votes_with_an_answer() -> None:
    pairs = [voted(KEPT, 0.9), voted(KEPT, 0.9, share=1.0), voted(UNPARSABLE, None, None, share=None)]
    found = measure_verdicts(pairs, None, from_file=False)
    assert found.majority_share is not None
    assert (found.majority_share.value, found.majority_share.n) == (0.875, 2)
    assert found.swap_consistency.n == 0
    assert "majority_share" not in measure_verdicts([verdict()], None, from_file=False).as_json()


def test_the_mean_entropy_of_votes_is_over_the_pairs_with_readable_votes() -> None:
    def sampled(*entropies: float | None) -> Verdict:
        plain = PairwiseEvidence(0.9, 0.9, (0.0, 0.0), ("", ""))
        evidence = SampledPairwiseEvidence(**vars(plain), readable_votes=(2, 2), vote_entropies=entropies)
        return dataclasses.replace(verdict(), evidence=evidence)

    found = measure_verdicts([sampled(0.6, 0.2), sampled(None, 0.0), sampled(None, None)], None, from_file=False)
    assert found.vote_entropy is not None
    assert (found.vote_entropy.value, found.vote_entropy.n) == (pytest.approx(0.2), 2)
    assert (found.swap_consistency.value, found.swap_consistency.n) == (1.0, 3)
    assert "vote_entropy" not in measure_verdicts([verdict()], None, from_file=False).as_json()


def test_without_gold_no_label_is_checked() -> None:
    found = measure_verdicts([verdict()], None, from_file=True)
    assert (found.label_accuracy_gold, found.source) == (None, "file")
