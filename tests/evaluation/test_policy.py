from __future__ import annotations

import pytest

from evidence_records import judgement
from selfeval.evaluation.policy import Answered, Outcome, compare_gold, gold_share, measure_policy, outcome, sample_of
from selfeval.judging.protocol import Judgement


@pytest.mark.parametrize(
    ("in_order", "swapped", "tie", "expected"),
    [
        pytest.param(0.9, 0.7, 0.1, "win", id="both orders prefer the policy's reply"),
        pytest.param(0.1, 0.4, 0.1, "loss", id="both orders prefer the one before"),
        pytest.param(0.9, 0.8, 0.51, "tie", id="both prefer the policy's, but the judge names a tie"),
        pytest.param(0.1, 0.2, 0.51, "tie", id="both prefer the one before, but the judge names a tie"),
        pytest.param(0.9, 0.8, 0.5, "win", id="a tie that is not above the limit is none"),
        pytest.param(0.99, 0.4, 0.0, "tie", id="the orders disagree, whatever their average"),
        pytest.param(0.01, 0.6, 0.0, "tie", id="the orders disagree the other way"),
        pytest.param(0.5, 0.5, 0.0, "tie", id="exactly half in both orders"),
        pytest.param(0.5, 0.9, 0.0, "tie", id="exactly half in one order does not agree with the other"),
        pytest.param(None, 0.9, 0.0, "unparsable", id="one order did not parse"),
        pytest.param(0.9, None, 0.0, "unparsable", id="the other order did not parse"),
        pytest.param(None, None, 0.0, "unparsable", id="neither order parsed"),
    ],
)
def test_the_outcome_of_a_comparison(in_order: float | None, swapped: float | None, tie: float, expected: Outcome) -> None:
    assert outcome(judgement(in_order, swapped, tie), 0.5) == expected


@pytest.mark.parametrize(
    ("probability", "tie", "expected"),
    [
        (0.9, None, "win"),
        (0.1, None, "loss"),
        (0.5, None, "tie"),
        (0.9, 0.6, "tie"),
        (None, None, "unparsable"),
    ],
)
def test_without_both_orders_the_probability_decides(probability: float | None, tie: float | None, expected: Outcome) -> None:
    assert outcome(Judgement(probability, tie), 0.5) == expected


def test_the_limit_of_a_tie_is_the_given_one() -> None:
    said = judgement(0.9, 0.8, 0.3)
    assert outcome(said, 0.29) == "tie"
    assert outcome(said, 0.3) == "win"


def answered(
    number: int,
    found: Outcome = "win",
    *,
    tokens: tuple[int, int] = (8, 6),
    gold: tuple[bool | None, bool | None] = (None, None),
) -> Answered:
    return Answered(f"What is {number}?", f"before {number}", f"after {number}", *tokens, True, True, 0.25, found, *gold)


def test_wins_ties_and_losses_by_hand() -> None:
    outcomes: list[Outcome] = ["win", "tie", "unparsable", "loss", "win"]
    found = measure_policy([answered(i, o) for i, o in enumerate(outcomes)], [], None, has_gold=False)
    assert (found.win, found.tie, found.loss, found.unparsable) == (2, 1, 1, 1)
    assert (found.win_rate.value, found.win_rate.n) == (2.5 / 4, 4)
    assert (found.win_rate_decisive.value, found.win_rate_decisive.n) == (pytest.approx(2 / 3), 3)
    wins = found.comparisons.win_rate
    assert (wins.wins, wins.losses, wins.difference.value, wins.finding) == (2, 1, 0.125, "too_few")
    assert (found.kl.value, found.kl.n) == (0.25, 5)
    assert (found.length_ratio.value, found.length_ratio.n) == (0.75, 5)  # unparsable ones have a length too
    assert found.gold_before is found.gold_after is found.gold_gain is found.comparisons.gold is None


def test_gold_before_and_after_are_not_exchanged() -> None:
    checked = [answered(0, gold=(False, True)), answered(1, gold=(False, True)), answered(2, gold=(True, False))]
    found = measure_policy(checked, [], None, has_gold=True)
    assert found.gold_before is not None
    assert found.gold_after is not None
    assert found.comparisons.gold is not None
    assert (found.gold_before.value, found.gold_after.value) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (found.comparisons.gold.wins, found.comparisons.gold.losses) == (2, 1)
    assert found.gold_gain == found.comparisons.gold.difference


def test_a_question_counts_for_the_gain_where_gold_can_judge_both_replies() -> None:
    found = compare_gold([answered(0, gold=(False, True)), answered(1, gold=(None, True)), answered(2, gold=(True, None))])
    assert (found.difference.n, found.wins, found.losses) == (1, 1, 0)


def test_the_gold_share_counts_only_questions_with_gold() -> None:
    found = gold_share([True, True, False, None])
    # Wilson for 2 of 3, z = 1.959964: centre 2/3 + z^2/6 = 1.306910, half width z sqrt(2/27 + z^2/36) = 0.833345,
    # both over 1 + z^2/3 = 2.280486.
    assert found.value == pytest.approx(2 / 3)
    assert found.ci_low == pytest.approx((1.306910 - 0.833345) / 2.280486, abs=1e-5)
    assert found.ci_high == pytest.approx((1.306910 + 0.833345) / 2.280486, abs=1e-5)
    assert found.n == 3
    assert (gold_share([None]).value, gold_share([None]).n) == (None, 0)


def test_a_sample_keeps_the_sides_apart() -> None:
    found = sample_of(answered(3, "loss", gold=(True, False)), 0.123456, -1.0)
    assert (found.before, found.gold_before, found.evaluator_before) == ("before 3", True, 0.1235)
    assert (found.after, found.gold_after, found.evaluator_after, found.verdict) == ("after 3", False, -1.0, "loss")
