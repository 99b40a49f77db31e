from __future__ import annotations

import pytest

from compared_runs import compared, scored
from selfeval.evaluation.run_comparison import MEASURES, Measure, RunEvidence, contrast, shared_questions
from selfeval.quality.comparisons import compare_independent, compare_means, compare_paired
from selfeval.quality.statistics import Figure, mean_figure, proportion

BY_NAME = {measure.name: measure for measure in MEASURES}
GOLD = BY_NAME["Gold accuracy of the policy"]


def _run(right: list[bool], prefix: str = "question", trained: tuple[str, ...] = ()) -> RunEvidence:
    questions = {f"t{n}": f"{prefix} {n}" for n in range(len(right))}
    return RunEvidence(questions, frozenset(trained), [compared(n, gold_after=one) for n, one in enumerate(right)], [])


def test_the_difference_of_independent_shares_is_newcombes() -> None:
    """Example (a) of Newcombe 1998, table II: 56/70 - 48/80, method 10: 0.0524 to 0.3339."""
    found = compare_independent(proportion([True] * 56 + [False] * 14), proportion([True] * 48 + [False] * 32))
    assert (found.value, found.n) == (pytest.approx(0.2), 150)
    assert found.ci_low == pytest.approx(0.0524, abs=5e-5)
    assert found.ci_high == pytest.approx(0.3339, abs=5e-5)


def test_a_figure_without_an_interval_gives_a_difference_without_one() -> None:
    assert compare_independent(Figure(0.5, None, None, 1), Figure(0.25, 0.1, 0.4, 9)) == Figure(0.25, None, None, 10)
    assert compare_independent(Figure(None, None, None, 0), Figure(0.25, 0.1, 0.4, 9)) == Figure(None, None, None, 9)


def test_means_are_compared_by_question() -> None:
    found = compare_means([3.0, 5.0, 4.0, 9.0], [1.0, 2.0, 4.0, 10.0])
    assert found.difference == mean_figure([2.0, 3.0, 0.0, -1.0], bounds=None)
    assert (found.wins, found.losses, found.test) == (2, 1, "sign_exact")
    with pytest.raises(ValueError, match="equal lengths"):
        compare_means([1.0], [])


def test_shared_questions_are_compared_in_pairs_whatever_their_ids() -> None:
    ours, theirs = [True] * 9 + [False], [False] * 9 + [True]
    other = _run(theirs)
    # The same texts with other ids, in another order.
    turned = RunEvidence(
        {f"x{9 - n}": text for n, text in enumerate(other.questions.values())},
        other.trained,
        [compared(0, question_id=f"x{9 - n}", gold_after=one) for n, one in enumerate(theirs)],
        [],
    )
    found = contrast(GOLD, _run(ours), turned)
    assert found.paired == compare_paired([float(one) for one in ours], [float(one) for one in theirs])
    assert found.finding == "better"
    assert found.difference.value == pytest.approx(0.8)


def test_other_questions_are_independent_samples() -> None:
    ours, theirs = _run([True] * 40), _run([False] * 30 + [True] * 10, prefix="another")
    found = contrast(GOLD, ours, theirs)
    assert found.paired is None
    assert found.difference == compare_independent(GOLD.figure(ours), GOLD.figure(theirs))
    assert found.finding == "better"
    assert contrast(GOLD, theirs, ours).finding == "worse"
    assert contrast(GOLD, _run([True] * 5), _run([False] * 5, prefix="another")).finding == "too_few"
    assert contrast(GOLD, _run([True] * 8 + [False] * 8), _run([True] * 7 + [False] * 9, "another")).finding == "unclear"


def test_few_shared_questions_are_no_reason_to_leave_the_others_out() -> None:
    ours, theirs = _run([True] * 40), _run([True] * 40)
    few = RunEvidence({key: text if n < 19 else f"another {n}" for n, (key, text) in enumerate(theirs.questions.items())},
                      frozenset(), theirs.compared, [])  # fmt: skip
    assert contrast(GOLD, ours, few).paired is None
    more = RunEvidence({key: text if n < 20 else f"another {n}" for n, (key, text) in enumerate(theirs.questions.items())},
                       frozenset(), theirs.compared, [])  # fmt: skip
    found = contrast(GOLD, ours, more).paired
    assert found is not None
    assert found.difference.n == 20


def test_a_question_that_a_run_was_trained_on_is_left_out() -> None:
    ours, theirs = _run([True] * 8), _run([True] * 8, trained=("question 3",))
    assert shared_questions(ours, theirs) == [f"question {n}" for n in range(8) if n != 3]
    assert shared_questions(theirs, ours) == shared_questions(ours, theirs)
    found = contrast(GOLD, ours, theirs).paired
    assert found is not None
    assert found.difference.n == 7


def test_pairs_of_a_question_count_once() -> None:
    """Ours is right in 2 and 1 of 2 pairs, theirs in 1 and 1: the differences are 0.5 and 0, and their mean is 0.25."""
    questions = {f"t{n}": f"question {n}" for n in range(8)}

    def run(rights: list[list[bool]]) -> RunEvidence:
        return RunEvidence(questions, frozenset(), [], [scored(n, right=one) for n, row in enumerate(rights) for one in row])

    ours, theirs = run([[True, True], [True, False]] * 4), run([[True, False], [False, True]] * 4)
    found = contrast(BY_NAME["Evaluator accuracy, gold labels"], ours, theirs)
    assert found.paired is not None
    assert found.difference.value == pytest.approx(0.25)
    assert found.difference.n == 8
    assert (found.ours.value, found.ours.n) == (0.75, 16), "the figure itself is over pairs, as in the report"


@pytest.mark.parametrize(
    ("name", "values", "figure"),
    [
        ("Gold accuracy before training", {"gold_before": True}, 1.0),
        ("Win rate over the run's own start", {"outcome": "tie"}, 0.5),
        ("Replies cut off at the token limit", {"finished_after": False}, 1.0),
        ("Reply length, tokens", {"tokens_after": 21}, 21.0),
        ("KL to the run's own start, nats per reply", {"kl": 0.75}, 0.75),
    ],
)
def test_measures_read_their_field(name: str, values: dict[str, object], figure: float) -> None:
    measure: Measure = BY_NAME[name]
    rows = [compared(n, **values) for n in range(3)]
    assert measure.figure(RunEvidence({f"t{n}": f"{n}" for n in range(3)}, frozenset(), rows, [])).value == figure


def test_missing_gold_and_unparsable_outcomes_have_no_credit() -> None:
    run = RunEvidence({"t0": "0"}, frozenset(), [compared(0, gold_after=None, outcome="unparsable")], [])
    assert GOLD.figure(run).n == 0
    assert BY_NAME["Win rate over the run's own start"].figure(run).n == 0
