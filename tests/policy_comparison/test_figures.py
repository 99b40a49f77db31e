"""Figures of a comparison from given outcomes: ranks, ties, questions needed, agreement of judges, and rows of text."""

from __future__ import annotations

import pytest

from selfeval.evaluation.policy import Outcome
from selfeval.policy_comparison.figures import JudgeFigures, agreement, measure_gold, measure_judge
from selfeval.policy_comparison.page import render
from selfeval.policy_comparison.result import PolicyComparison, pair_rows, rank_rows, sentences
from selfeval.policy_comparison.sources import Questions
from selfeval.quality.comparisons import compare_with_level
from selfeval.records import Question, Split

NAMES = ("good", "<b>bad</b>", "middle")


def _row(win: int, tie: int, loss: int, unparsable: int = 0) -> list[Outcome]:
    return [*["win"] * win, *["tie"] * tie, *["loss"] * loss, *["unparsable"] * unparsable]  # type: ignore[list-item]


@pytest.fixture(scope="module")
def three() -> JudgeFigures:
    """`good` beats `bad` clearly; `middle` cannot be told from either."""
    outcomes = {(0, 1): _row(18, 0, 2), (0, 2): _row(11, 2, 7), (1, 2): _row(7, 0, 11, unparsable=2)}
    return measure_judge("referee", NAMES, outcomes, [[10] * 20, [10] * 20, [30] * 20])


def test_only_claimed_differences_separate_ranks(three: JudgeFigures) -> None:
    assert [(place.name, place.ranks) for place in three.ranking] == [("good", "1-2"), ("middle", "1-3"), ("<b>bad</b>", "2-3")]
    values = [place.strength.known for place in three.ranking]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(0)
    found = {(pair.first, pair.second): pair.comparison.finding for pair in three.pairs}
    assert found == {("good", "<b>bad</b>"): "better", ("good", "middle"): "unclear", ("<b>bad</b>", "middle"): "unclear"}


def test_pairs_count_ties_as_half_and_leave_out_what_is_unparsable(three: JudgeFigures) -> None:
    first, second, third = three.pairs
    assert (second.win, second.tie, second.loss, second.win_rate.value, second.win_rate.n) == (11, 2, 7, 0.6, 20)
    assert (third.unparsable, third.win_rate.n) == (2, 18)
    assert third.win_rate.value == pytest.approx(7 / 18)
    assert first.comparison == compare_with_level([1.0] * 18 + [0.0] * 2)
    # δ = 4/20, ψ = 18/20: ((1.96 √0.9 + 0.8416 √0.86) / 0.2)² + 5 = 174.2 + 5.
    assert (first.questions_needed, second.questions_needed) == (None, 180)


def test_a_win_by_length_alone_is_no_win_at_equal_length() -> None:
    # The first policy wins where its reply is longer, and loses where it is shorter; it is longer on three of four questions.
    outcomes, lengths = _row(30, 0, 10), [[40] * 30 + [10] * 10, [10] * 30 + [40] * 10]
    pair = measure_judge("referee", NAMES[:2], {(0, 1): outcomes}, lengths).pairs[0]
    assert pair.win_rate.value == 0.75
    assert pair.comparison.finding == "better"
    assert pair.length_controlled.known < 0.65
    assert pair.length_controlled.ci_low is not None
    assert pair.length_controlled.ci_low < 0.5


def test_a_better_policy_that_is_given_second_is_first() -> None:
    found = measure_judge("gold", NAMES[:2], {(0, 1): _row(0, 2, 10)}, [[1] * 12] * 2)
    assert [(place.name, place.ranks) for place in found.ranking] == [("<b>bad</b>", "1"), ("good", "2")]


def test_agreement_is_of_outcomes_and_skips_missing_ones() -> None:
    ours, theirs = {(0, 1): _row(2, 1, 1)}, {(0, 1): _row(2, 1, 0, unparsable=1)}
    found = agreement([ours, theirs])
    assert found is not None
    assert (found.value, found.n) == (1.0, 3)
    assert agreement([ours]) is None


def test_gold_is_paired_on_the_questions_that_both_know() -> None:
    found = measure_gold(NAMES[:2], [[True, True, None, False], [False, None, True, False]])
    assert found.accuracy["good"].value == pytest.approx(2 / 3)
    assert found.accuracy["good"].n == 3
    (pair,) = found.pairs
    assert (pair[2].difference.value, pair[2].difference.n) == (0.5, 2)


def test_page_and_rows_show_the_figures_and_escape_names(three: JudgeFigures) -> None:
    asked = Questions((Question("", "Why?", Split.TEST, "file"),) * 20, 20)
    gold = measure_gold(NAMES, [[True] * 3, [False] * 3, [True, False, None]])
    result = PolicyComparison(NAMES, "runs/one", asked, (three,), None, gold, ("a note",))
    assert rank_rows(three)[0][:2] == ("good", "1-2")
    first = pair_rows(three)[0]
    assert (*first[:3], *first[4:6], first[7]) == ("good", "<b>bad</b>", "90.0%", "20", "18/0/2", "better")
    assert pair_rows(three)[1][-1] == "not clear; about 180 questions needed"
    said = list(sentences(result))
    assert said[0] == "referee: comparisons without a verdict, which are left out: 2"
    assert said[-1] == "note: a note"
    page = render(result)
    assert "&lt;b&gt;bad&lt;/b&gt;" in page
    assert "<b>bad" not in page
    assert "could not be drawn" not in page
    assert '<svg class="chart"' in page
    # The matrix has both directions of a pair.
    assert '<td class="amount">90.0%</td>' in page
    assert '<td class="amount">10.0%</td>' in page
