"""Tests against chance: counts and p-values by hand."""

from __future__ import annotations

import random

import pytest

from evidence_records import KEPT, UNSURE, reply, verdict
from selfeval.evaluation.judge_chance import (
    labels_against_chance,
    lengths_against_chance,
    majority_of,
    orders_against_chance,
    right_by_majority,
    votes_against_chance,
)
from selfeval.records import AgreementEvidence, Split, Unreadable, Verdict

FIRST_RIGHT, SECOND_RIGHT = (True, False), (False, True)


def ballot(number: int, answers: tuple[str | None, str | None], votes: dict[str, int], unread: int = 0) -> Verdict:
    causes = (None,) * sum(votes.values()) + (Unreadable.NO_ANSWER,) * unread
    evidence = AgreementEvidence(answers, votes, 0.5, 0.0, 1.0, causes)
    return Verdict(f"q{number}", Split.TRAIN, f"q{number}-r0", f"q{number}-r1", KEPT, 0.9, 0.0, evidence)


def test_labels_count_where_they_are_kept_and_one_reply_is_right() -> None:
    verdicts = [verdict(probability=p) for p in (0.9,) * 7 + (0.1,)]
    # Neither a pair of equal replies, nor an unsure verdict, nor an unknown answer is a case.
    others = [verdict(), verdict(), verdict(probability=0.6, state=UNSURE), verdict()]
    right = [FIRST_RIGHT] * 8 + [(True, True), (False, False), SECOND_RIGHT, (None, True)]
    found = labels_against_chance([*verdicts, *others], right)
    assert (found.wins, found.losses, found.difference.n) == (7, 1, 8)
    # 2 (C(8, 0) + C(8, 1)) / 2^8
    assert found.p_value == pytest.approx(18 / 256)
    assert found.finding == "unclear"


def test_a_judge_that_chooses_a_position_is_not_consistent() -> None:
    biased = [verdict(in_order=0.95, swapped=0.05)] * 10
    found = orders_against_chance([*biased, verdict(), verdict(in_order=0.5, swapped=0.5, ties=(1.0, 1.0))])
    # The tie is neither; the only consistent pair is one win against ten losses.
    assert (found.wins, found.losses, found.finding) == (1, 10, "worse")
    assert orders_against_chance([verdict()] * 10).finding == "better"


def test_a_vote_whose_answers_depend_on_the_question_beats_chance() -> None:
    found = votes_against_chance([ballot(i, (str(i), None), {str(i): 4}) for i in range(8)])
    assert (found.wins, found.losses, found.finding) == (8, 0, "better")
    assert found.difference.value == 0.5


def test_a_vote_that_always_has_the_same_answer_is_chance() -> None:
    found = votes_against_chance([ballot(i, ("7", "7"), {"7": 4}) for i in range(20)])
    assert (found.wins, found.losses, found.finding) == (0, 0, "unclear")
    assert votes_against_chance([ballot(0, ("7", "7"), {"7": 4})]).finding == "too_few"


def test_random_votes_rarely_beat_chance() -> None:
    """Answers that do not depend on the question: at most 2.5% of draws may be claimed as better."""
    rng = random.Random(0)

    def draw() -> bool:
        answers = [rng.choice("1234") for _ in range(60)]
        ballots = [ballot(i, (answers[2 * i], answers[2 * i + 1]), {rng.choice("1234"): 4}) for i in range(30)]
        return votes_against_chance(ballots).finding == "better"

    # 400 draws at 2.5%: more than 20 has a probability below 0.1%.
    assert sum(draw() for _ in range(400)) <= 20


def test_a_majority_has_more_than_half_of_all_votes() -> None:
    assert majority_of(ballot(0, ("1", "2"), {"1": 3, "2": 1})) == "1"
    assert majority_of(ballot(0, ("1", "2"), {"1": 3, "2": 1}, unread=2)) is None
    assert majority_of(verdict()) is None
    assert right_by_majority(ballot(0, ("2", "1"), {"1": 3})) == SECOND_RIGHT
    assert right_by_majority(ballot(0, ("2", None), {"1": 2, "2": 2})) == (None, None)


def test_the_longer_reply_is_counted_by_tokens() -> None:
    replies = {r.id: r for r in (reply("q1-r0", "x", ids=(5, 6, 7, 1)), reply("q1-r1", "y", ids=(5, 1)))}
    found = lengths_against_chance([verdict(probability=0.9)] * 6 + [verdict(probability=0.1)] * 2, replies)
    assert (found.wins, found.losses) == (6, 2)
