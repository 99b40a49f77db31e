from __future__ import annotations

import dataclasses
import math

import pytest

from evidence_records import UNPARSABLE, UNSURE, pair, reply, verdict
from selfeval.evaluation.evaluator import (
    EvaluatorFacts,
    JudgedPair,
    LabelledPair,
    Rights,
    by_gold,
    by_judge,
    measure_evaluator,
    measure_first_pairs,
    rights_of,
)
from selfeval.quality.margin_signals import MarginCalibration
from selfeval.records import Reply, VerdictState
from selfeval.report.schema import Evaluator, FirstPairs

FACTS = EvaluatorFacts(temperature=2.0, temperature_pairs=60, pairs_trained=77, members=1)


def measured(pairs: list[JudgedPair], *, gold: bool = True, members: int = 1, from_file: bool = False) -> Evaluator:
    facts = dataclasses.replace(FACTS, members=members, labels_from_file=from_file)
    return measure_evaluator(pairs, facts, first_pairs(pairs, gold=gold), None, has_gold=gold)


def first_pairs(pairs: list[JudgedPair], *, gold: bool = True) -> FirstPairs:
    return measure_first_pairs(rights_of(pairs), None, has_gold=gold)


# -- labels -------------------------------------------------------------------------------------------------------------


def test_gold_says_which_reply_is_better_in_either_place() -> None:
    found = by_gold([pair("1", "7", said=verdict("q1", 0.1)), pair("7", "1")])
    assert [p.better for p in found] == [0, 1]  # not what the judge preferred (1, 0)
    assert [p.evaluator_right for p in found] == [True, False]  # it preferred the first reply both times


def test_pairs_that_gold_cannot_tell_apart_are_left_out() -> None:
    both_right, both_wrong = pair("1", "1"), pair("7", "8")
    without_gold = pair("a feeling", "a word", question="love")
    told_apart = pair("2", "9", question="q2")
    found = by_gold([both_right, both_wrong, without_gold, told_apart, pair("1", "7", gold=False)])
    assert [p.question_id for p in found] == ["q2"]


@pytest.mark.parametrize("state", list(VerdictState))
@pytest.mark.parametrize("probability", [0.99, 0.5, 0.01, None])
def test_no_verdict_of_the_judge_decides_what_gold_counts(state: VerdictState, probability: float | None) -> None:
    assert [p.better for p in by_gold([pair("1", "7", said=verdict("q1", probability, state))])] == [0]


def test_the_judge_labels_the_pairs_that_it_was_sure_of() -> None:
    said = [verdict("q1", 0.9), verdict("q1", 0.2), verdict("q1", 0.5), verdict("q1", 0.1, UNSURE)]
    assert [p.better for p in by_judge([pair("1", "7", said=v) for v in said])] == [0, 1]  # 0.5 prefers neither


@pytest.mark.parametrize(
    ("margin", "better", "right"),
    [(0.1, 0, True), (0.1, 1, False), (-0.1, 1, True), (-0.1, 0, False), (0.0, 0, False), (0.0, 1, False)],
)
def test_the_evaluator_is_right_when_it_scores_the_better_reply_higher(margin: float, better: int, right: bool) -> None:
    assert LabelledPair(pair("a", "b", margin=margin), better).evaluator_right is right


# -- baselines ----------------------------------------------------------------------------------------------------------


def four_pairs(*, exchanged: bool = False) -> list[JudgedPair]:
    """Four pairs with the labels of the table below; `exchanged`: the other reply is right."""

    def made(
        first: tuple[str, int, float], second: tuple[str, int, float], better: int, probability: float | None
    ) -> JudgedPair:
        a, b = (reply(f"q1-r{n}", t, [7] * count, logprob) for n, (t, count, logprob) in enumerate((first, second)))
        is_first = (better == 0) != exchanged
        return JudgedPair(verdict("q1", probability, UNSURE), (a, b), 1.0, 0.0, (is_first, not is_first))

    return [
        made(("aaaa", 6, -3.0), ("bb", 1, -1.0), better=0, probability=None),
        made(("aaa", 2, -2.0), ("bbb", 4, -6.0), better=1, probability=0.0),
        made(("a", 1, -1.0), ("bbb", 2, -2.0), better=1, probability=0.5),
        made(("a", 1, -1.0), ("bbb", 1, -2.0), better=0, probability=0.9),
    ]


def values(pairs: list[JudgedPair]) -> dict[str, float | None]:
    found = measured(pairs).baselines
    assert found.judge is not None
    return {
        "longer_wins": found.longer_wins.value,
        "first_wins": found.first_wins.value,
        "mean_logprob": found.mean_logprob.value,
        "judge": found.judge.value,
    }


def test_the_baselines_by_hand() -> None:
    # pair (better)      1 (first)          2 (second)          3 (second)         4 (first)            mean
    # longer text        4 > 2      1       3 = 3        1/2    3 > 1       1      3 > 1        0       2.5 / 4 = 0.625
    # the first                     1                    0                  0                   1       2.0 / 4 = 0.5
    # log-prob a token   -.5 > -1   1       -1 > -1.5    0      -1 = -1     1/2    -1 > -2      1       2.5 / 4 = 0.625
    #   (a reply would   -3 < -1    0       -2 > -6      0      -1 > -2     0      -1 > -2      1       1.0 / 4)
    # judge              none       1/2     second (0)   1      half        1/2    first (.9)   1       3.0 / 4 = 0.75
    assert values(four_pairs()) == {"longer_wins": 0.625, "first_wins": 0.5, "mean_logprob": 0.625, "judge": 0.75}
    assert measured(four_pairs()).baselines.first_wins.n == 4


@pytest.mark.parametrize("place", [0, 1])
def test_a_reply_without_text_has_no_log_prob_to_win_with(place: int) -> None:
    text = reply("q1-r0", "aaaa", [7, 7], -3.0)
    cut = dataclasses.replace(reply("q1-r1", "", [2], 0.0), finished=False, thinking="First, ")

    def found(other: Reply, better: int) -> float | None:
        two = (other, text) if place == 0 else (text, other)
        right = (better == 0, better == 1)
        return values([JudgedPair(verdict("q1", None, UNSURE), two, 1.0, 0.0, right)])["mean_logprob"]

    assert [found(cut, better) for better in (place, 1 - place)] == [0.0, 1.0]
    # A finished reply has the log-prob of its end token.
    assert found(dataclasses.replace(cut, finished=True, logprob=-1.0), place) == 1.0
    neither = JudgedPair(verdict("q1", None, UNSURE), (cut, cut), 1.0, 0.0, (True, False))
    assert values([neither])["mean_logprob"] == 0.5


def test_a_baseline_does_not_see_which_reply_is_better() -> None:
    # The same four pairs with the other reply right: every right choice is wrong, and halves stay halves.
    exchanged = {"longer_wins": 0.375, "first_wins": 0.5, "mean_logprob": 0.375, "judge": 0.25}
    assert values(four_pairs(exchanged=True)) == exchanged


def test_no_pairs_have_no_baselines() -> None:
    assert set(values([]).values()) == {None}


def test_labels_of_a_file_have_no_judge_to_compare_with() -> None:
    found = measured([pair("1", "7", said=verdict("q1", 1.0))], from_file=True)
    assert (found.baselines.judge, found.comparisons.judge) == (None, None)
    assert "judge" not in found.baselines.model_dump()
    assert "judge" in found.comparisons.model_dump()


def test_a_judge_without_evidence_is_a_judge() -> None:
    said = dataclasses.replace(verdict("q1", 1.0), evidence=None)
    found = measured([pair("1", "7", said=said)])
    assert found.baselines.judge is not None
    assert found.comparisons.judge is not None


# -- figures ------------------------------------------------------------------------------------------------------------


def test_the_evaluator_is_measured_on_gold_unfiltered_and_on_the_sure_judge() -> None:
    two_ln_3 = 2 * math.log(3.0)  # at temperature 2 a confidence of 1 / (1 + 1/3) = 3/4
    found = measured(
        [
            pair("1", "7", margin=two_ln_3, said=verdict("q1", 0.9)),  # gold: right; judge: right
            pair("7", "1", margin=two_ln_3, said=verdict("q1", 0.9)),  # gold: wrong; judge: right
            pair("1", "7", margin=two_ln_3, said=verdict("q1", None, UNPARSABLE)),  # gold: right
            pair("1", "7", margin=two_ln_3, said=verdict("q1", 0.6, UNSURE)),  # gold: right
            pair("1", "1", margin=-two_ln_3, said=verdict("q1", 0.9)),  # gold: undecided; judge: wrong
        ]
    )
    assert found.accuracy_gold is not None
    assert (found.accuracy_gold.value, found.accuracy_gold.n) == (0.75, 4)
    assert (found.accuracy_judge.value, found.accuracy_judge.n) == (pytest.approx(2 / 3), 3)
    assert (found.baselines_on, found.baselines.first_wins.n) == ("gold", 4)
    # Confidence 3/4 four times, right three times: (3 (1/4)^2 + (3/4)^2) / 4 = (3 + 9) / 64 = 0.1875.
    assert found.brier.value == pytest.approx(0.1875)
    # Calibrated in the one bin that four cases fill; with one bin per case the error would be 0.375.
    assert (found.ece.value, found.ece.ci_low) == (pytest.approx(0.0), pytest.approx(0.0))
    assert found.ece.ci_high is not None
    assert found.ece.ci_high > 0.3
    assert (found.temperature, found.temperature_pairs, found.pairs_trained) == (2.0, 60, 77)
    assert found.risk_coverage[-1] == (1.0, 0.25)
    assert found.disagreement is None


def test_a_confidence_of_margin_and_disagreement_replaces_that_of_the_margin() -> None:
    # Both pairs have the margin 2 ln 3, with confidence 3/4 at T = 2; on the second one, which is wrong, the members disagree.
    margin = 2 * math.log(3)
    sure, doubted = pair("1", "7", margin=margin), pair("1", "7", margin=-margin)
    doubted = dataclasses.replace(doubted, disagreement=2.0)
    calibration = MarginCalibration({"choice": 0.0, "margin": 0.5, "disagreement": -math.log(3) / 2})
    facts = dataclasses.replace(FACTS, members=2, confidence=calibration)
    now = Rights({}, {})
    first = measure_first_pairs(now, None, has_gold=True)
    found = measure_evaluator([doubted, sure], facts, first, None, has_gold=True)
    # Confidences 1/2 (wrong) and 3/4 (right): ((1/2)^2 + (1/4)^2) / 2.
    assert found.brier.value == pytest.approx((0.25 + 0.0625) / 2)
    assert found.confidence is not None
    assert found.confidence.disagreement == -math.log(3) / 2
    # The surer pair is right: risks 0 and 1/2. By the margin alone the wrong one is first: 1 and 1/2.
    assert (found.confidence.aurc, found.confidence.aurc_of_margin) == (0.25, 0.75)
    assert measured([doubted, sure]).confidence is None


def test_without_gold_the_sure_judge_gives_the_labels() -> None:
    pairs = [pair("1", "7", margin=-1.0, gold=False), pair("1", "7", said=verdict("q1", 0.6, UNSURE), gold=False)]
    found = measured(pairs, gold=False)
    assert found.accuracy_gold is None
    assert (found.accuracy_judge.value, found.accuracy_judge.n) == (0.0, 1)
    assert found.baselines.judge is not None
    assert (found.baselines_on, found.baselines.judge.n) == ("judge", 1)
    assert found.comparisons.judge is None, "on its own labels the judge is right by construction"
    assert found.comparisons.chance.losses == 1


def test_the_evaluator_is_compared_with_each_baseline_on_the_same_pairs() -> None:
    # Of ten pairs, one of each question, the first reply is right in all, the evaluator in nine, the judge in one.
    pairs = [
        dataclasses.replace(
            pair(str(i % 8), "99", question=f"q{i % 8}", margin=-1.0 if i == 9 else 1.0),
            verdict=verdict(f"q{i}", 0.9 if i == 9 else 0.1),
        )
        for i in range(10)
    ]
    found = measured(pairs).comparisons
    assert found.judge is not None
    assert (found.judge.wins, found.judge.losses, found.judge.test, found.judge.finding) == (9, 1, "mcnemar_exact", "better")
    assert (found.judge.difference.value, found.judge.difference.n) == (pytest.approx(0.8), 10)
    assert found.judge.p_value == pytest.approx(2 * 11 / 2**10)  # C(10, 0) + C(10, 1) = 11
    assert (found.first_wins.wins, found.first_wins.losses) == (0, 1)
    assert (found.chance.difference.value, found.chance.test) == (pytest.approx(0.4), "binomial_exact")
    # Replies of equal log-prob per token are half a credit each.
    logprob = found.mean_logprob
    assert (logprob.wins, logprob.losses, logprob.test) == (9, 1, "sign_exact")


def test_pairs_of_one_question_are_one_case_of_the_comparison() -> None:
    found = measured([pair("1", "7", said=verdict("q1", 0.1))] * 30).comparisons.judge
    assert found is not None
    assert (found.difference.n, found.wins, found.finding) == (1, 1, "too_few")


def test_an_ensemble_that_disagrees_on_its_errors_knows_them() -> None:
    pairs = [
        dataclasses.replace(pair("1", "7", margin=1.0 if right else -1.0), disagreement=0.1 * i + (0 if right else 9))
        for i, right in enumerate([True] * 6 + [False] * 6)
    ]
    found = measured(pairs, members=2).disagreement
    assert found is not None
    assert found.error_correlation.known > 0.8


# -- round 1's pairs ----------------------------------------------------------------------------------------------------


def test_the_gain_is_over_the_round_before_on_the_same_pairs() -> None:
    names = [f"q{i}" for i in range(8)]
    before = Rights(dict.fromkeys(names, False), dict.fromkeys(names, True))
    pairs = [pair(str(i), "99", question=name) for i, name in enumerate(names)]
    found = measure_first_pairs(rights_of(pairs), before, has_gold=True)
    assert found.comparison is not None
    assert (found.comparison.wins, found.comparison.losses, found.comparison.finding) == (8, 0, "better")
    assert found.gain == found.comparison.difference
    by_judge_alone = measure_first_pairs(rights_of(pairs), before, has_gold=False)
    assert by_judge_alone.comparison is not None
    assert (by_judge_alone.comparison.wins, by_judge_alone.accuracy_gold) == (0, None)
    assert first_pairs(pairs).gain is None
