from __future__ import annotations

import pytest

from selfeval.evaluation.over_optimisation import CheckedReply, measure_over_optimisation, predict, shares_of


def test_scores_predict_by_the_first_iteration() -> None:
    # All scores are equal, so they predict the share of the first iteration: 1 of 3, with half a case added to each side.
    checked = {
        2: [CheckedReply("q1", 0.0, True), CheckedReply("q2", 0.0, True)],
        1: [CheckedReply("q1", 0.0, True), CheckedReply("q2", 0.0, False), CheckedReply("q3", 0.0, False)],
        3: [],
    }
    found = shares_of(predict(checked))
    assert list(found) == [1, 2]
    assert [shares.predicted for shares in found.values()] == pytest.approx([1.5 / 4] * 2, abs=1e-6)
    assert [(shares.gold, shares.n) for shares in found.values()] == [(pytest.approx(1 / 3), 3), (1.0, 2)]


def test_predicted_less_actual_accuracy_is_measured_over_the_distance() -> None:
    kls = dict(enumerate([0.0, 0.25, 1.0, 2.25, 4.0, 6.25, 9.0, 12.25], start=1))
    checked = {}
    for step in kls:
        # At first a score of 1 is right four times of five and one of -1 once of five; then all scores rise and gold does not.
        ones = 10 if step == 1 else 20
        scores = [1.0] * ones + [-1.0] * (20 - ones)
        right = [i % 5 != 0 for i in range(10)] + [i % 5 == 0 for i in range(10)]
        checked[step] = [CheckedReply(f"q{i % 4}", scores[i], right[i]) for i in range(20)]
    found = measure_over_optimisation(predict(checked), kls)
    assert found is not None
    assert found.start == (pytest.approx(0.5, abs=1e-6), 0.5)
    assert [point[0] for point in found.points] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])  # none at the start
    assert all(predicted == pytest.approx(0.8, abs=0.01) and gold == 0.5 for _, predicted, gold in found.points)
    assert found.gap.value == pytest.approx(0.3, abs=0.01)
    assert found.gap.n == 4  # the last two of eight iterations have ten replies to each of four questions
    assert (found.fit.gold.alpha, found.fit.gold.beta, found.fit.gold.rmse) == pytest.approx((0.0, 0.0, 0.0))
    assert found.fit.evaluator.alpha > 0.1


def test_too_few_iterations_give_no_fit() -> None:
    checked = {step: [CheckedReply("q1", 0.0, True)] for step in (1, 2, 3)}
    assert measure_over_optimisation(predict(checked), {1: 1.0, 2: 2.0, 3: 3.0}) is None
    assert measure_over_optimisation({}, {}) is None
