"""Agreement with people, the majority, and the threshold."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from label_world import current, is_right, label, labels_of, make_pairs, pair, share_right
from selfeval.labelling.agreement import Agreement, answered_pairs, measure_agreement
from selfeval.labelling.pairs import latest_labels, people_choice, texts_of
from selfeval.labelling.queue import UNIFORM, Draw, draw_queue
from selfeval.labelling.threshold import label_threshold, labels_needed, uniform_sample
from selfeval.labelling.weights import draw_probabilities
from selfeval.quality.statistics import Figure


def test_a_later_label_replaces_the_earlier_one_and_undo_removes_it() -> None:
    one, two = pair(0), pair(1)
    given = [label(one, "first"), label(two, "tie"), label(one, "first", turned=True), label(two, "undo")]
    found = current(given, [one, two])
    assert found == {one.key: (given[2],)}
    assert people_choice(one, found[one.key]) == "second", "the first shown is the second of the pair"


def test_a_label_of_other_texts_does_not_replace_one() -> None:
    one = pair(0)
    given = [label(one, "first"), label(one, "second", texts="other"), label(one, "undo", texts="another")]
    assert current(given, [one]) == {one.key: (given[0],)}
    assert latest_labels(given) == given[:2]


def test_labels_of_other_texts_are_not_used() -> None:
    one = pair(0)
    assert current([label(one, "first", texts="other"), label(pair(7), "first")], [one]) == {}
    assert texts_of("Q", "a", "b") == texts_of("Q", "b", "a") != texts_of("Q", "a", "c")


@pytest.mark.parametrize(
    ("choices", "expected"),
    [(["first", "first", "second"], "first"), (["first", "second"], None), (["tie", "skip"], "tie"), (["skip"], None)],
)
def test_several_raters_count_by_their_majority(choices: list[str], expected: str | None) -> None:
    one = pair(0)
    assert people_choice(one, [label(one, choice, f"r{n}") for n, choice in enumerate(choices)]) == expected


def test_all_pairs_labelled_give_the_plain_shares() -> None:
    pairs, better = make_pairs(40, 1)
    found = measure_agreement(draw_queue(pairs, 1.0, 0), labels_of(pairs, better))
    assert found.evaluator.value == pytest.approx(share_right(pairs, better))
    kept = [one for one in pairs if one.state == "kept"]
    right = [((one.probability or 0) > 0.5) == (better[one.texts] == "first") for one in kept]
    assert found.judge_kept.value == pytest.approx(fmean(right))
    assert found.judge_kept.n == len(kept)
    assert (found.pairs, found.labelled, found.decided, found.ties, found.skipped) == (40, 40, 40, 0, 0)
    assert (found.raters, found.kappa) == ({"ann": 40}, None)


def test_ties_skips_and_equal_scores_follow_the_convention() -> None:
    pairs = [pair(0), pair(1, -1.0), pair(2, 0.0), pair(3), pair(4), pair(5, 1.0, None)]
    choices = ["first", "first", "first", "tie", "skip", "first"]
    labels = current([label(one, choice) for one, choice in zip(pairs, choices, strict=True)], pairs)
    found = measure_agreement(draw_queue(pairs, 1.0, 0), labels)
    # Right, wrong, no preference, and right on the pair without a verdict.
    assert found.evaluator.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert (found.judge.value, found.judge.n) == (1.0, 3)
    assert (found.labelled, found.decided, found.ties, found.skipped) == (5, 4, 1, 1)


def test_no_labels_have_no_figures() -> None:
    found = measure_agreement(draw_queue([pair(0)], 1.0, 0), {})
    assert found == Agreement(1, 0, 0, 0, 0, {}, *[Figure(None, None, None, 0)] * 3, None, None, 0)
    assert found.as_json()["evaluator"]["value"] is None


def test_two_raters_have_kappa_and_three_have_alpha() -> None:
    pairs = [pair(n) for n in range(4)]
    queue = draw_queue(pairs, 1.0, 0)
    # p_o = 3/4, p_e = 1/4 + 1/8: the example of `cohen_kappa`. The second rater sees the replies in the other order.
    ann = [label(one, c) for one, c in zip(pairs, ["first", "first", "second", "second"], strict=True)]
    bob = [label(one, c, "bob", turned=True) for one, c in zip(pairs, ["second", "second", "first", "tie"], strict=True)]
    found = measure_agreement(queue, current([*ann, *bob], pairs))
    assert found.kappa is not None
    assert found.kappa.value == pytest.approx(0.6)
    cid = [label(one, "skip", "cid") for one in pairs[:2]] + [label(pairs[2], "second", "cid")]
    three = measure_agreement(queue, current([*ann, *bob, *cid], pairs))
    assert three.kappa is not None
    # Alpha of the units 11, 11, 222, 2t: D_o = (1·1 + 1·1) / 1 / 9, D_e = (4·5 + 4·5 + 1·8) / (9 · 8).
    assert three.kappa.value == pytest.approx(1 - (2 / 9) / (48 / 72))
    assert three.raters == {"ann": 4, "bob": 4, "cid": 1}


def test_a_few_dozen_labels_estimate_the_share_of_all_pairs_without_bias() -> None:
    """40 of 300 pairs, in 400 queues. The mean of the estimates differs from the truth by less than 4 standard errors."""
    pairs, better = make_pairs(300, 5)
    truth, estimates, plain, covered = share_right(pairs, better), [], [], 0
    for seed in range(400):
        queue = draw_queue(pairs, 1.0, seed)
        first = [draw.pair for draw in queue[:40]]
        figure = measure_agreement(queue, labels_of(first, better)).evaluator
        estimates.append(figure.known)
        plain.append(share_right(first, better))
        covered += (figure.ci_low or 0.0) <= truth <= (figure.ci_high or 1.0)
    assert fmean(estimates) == pytest.approx(truth, abs=4 * stdev(estimates) / math.sqrt(400))
    # Without the weights, the doubtful pairs that come first would make the evaluator look worse.
    assert fmean(plain) < truth - 0.02
    # Binomial(400, 0.95) is below 0.92 with a probability of 0.5%.
    assert covered / 400 > 0.92


def test_labels_after_a_pair_that_nobody_answered_are_not_used() -> None:
    pairs, better = make_pairs(30, 2)
    queue = draw_queue(pairs, 1.0, 0)
    first = labels_of([draw.pair for draw in queue[:3]], better)
    gap = labels_of([draw.pair for n, draw in enumerate(queue[:10]) if n != 3], better)
    assert answered_pairs(queue, gap) == answered_pairs(queue, first) != []
    assert measure_agreement(queue, gap) == replace(measure_agreement(queue, first), unused=6)


def test_a_gap_does_not_bias_the_estimate() -> None:
    """The exact expectation over all orders of four pairs, with the third draw unanswered and the fourth labelled."""
    weights, credits = [4.0, 1.0, 0.5, 2.0], [1.0, 0.0, 1.0, 0.0]
    pairs = [pair(n, 1.0 if credit else -1.0) for n, credit in enumerate(credits)]
    expected = 0.0
    for order in itertools.permutations(range(4)):
        queue = [Draw(pairs[i], weights[i], place, False) for place, i in enumerate(order)]
        labels = current([label(pairs[order[n]], "first") for n in (0, 1, 3)], pairs)
        answered = answered_pairs(queue, labels)
        estimate = sum(one.weight * credits[int(one.draw.pair.question_id[1:])] for one in answered) / len(answered)
        expected += math.prod(draw_probabilities([weights[i] for i in order], UNIFORM)) * estimate
    assert expected == pytest.approx(sum(credits) / 4, abs=1e-12)


# -- the threshold ------------------------------------------------------------------------------------------------------


def test_the_uniform_sample_is_uniform() -> None:
    """Each pair is in the sample as often as any other, although the queue prefers the doubtful ones."""
    pairs = [pair(n, 0.05 if n < 20 else 5.0, 0.6 if n < 20 else 0.99) for n in range(60)]
    better = {one.texts: "first" for one in pairs}
    doubtful = size = drawn = 0
    for seed in range(600):
        queue = draw_queue(pairs, 1.0, seed)[:30]
        sample = uniform_sample(answered_pairs(queue, labels_of([draw.pair for draw in queue], better)))
        doubtful += sum(one.draw.pair.margin == 0.05 for one in sample)
        size += len(sample)
        drawn += sum(draw.pair.margin == 0.05 for draw in queue)
    # A third of the pairs. The share has a standard error below √(2/9 / 600 / mean size) < 0.006.
    assert doubtful / size == pytest.approx(1 / 3, abs=0.03)
    assert drawn / (600 * 30) > 0.4
    assert size / 600 > 13


def test_enough_labels_give_a_threshold_and_few_do_not() -> None:
    rng = random.Random(0)
    # Confidence 0.95 is always right, 0.6 half of the time.
    pairs = [pair(n, 3.0 if n % 2 else 0.4) for n in range(400)]
    better = {one.texts: "first" if one.margin == 3.0 or rng.random() < 0.5 else "second" for one in pairs}
    queue = draw_queue(pairs, 1.0, 0)
    few = label_threshold(answered_pairs(queue, labels_of([d.pair for d in queue[:30]], better)), 1.0)
    assert few.value is None
    assert labels_needed(few) == 44  # 0.9^44 < 0.05 / 5
    found = label_threshold(answered_pairs(queue, labels_of(pairs, better)), 1.0)
    assert found.value is not None
    assert 0.6 <= found.value <= 0.95  # sigmoid(0.4) = 0.5987, sigmoid(3) = 0.9526
    assert found.coverage.value == pytest.approx(0.5, abs=0.01)
    assert is_right(pairs[1], better)


def test_equal_scores_are_never_sure() -> None:
    pairs = [pair(n, 0.0) for n in range(300)]
    answered = answered_pairs(draw_queue(pairs, 1.0, 0), labels_of(pairs, {one.texts: "first" for one in pairs}))
    assert label_threshold(answered, 1.0).selected == 0


def test_a_question_counts_once() -> None:
    pairs = [pair(n, 3.0, question=n // 10) for n in range(300)]
    answered = answered_pairs(draw_queue(pairs, 1.0, 0), labels_of(pairs, {one.texts: "first" for one in pairs}))
    assert label_threshold(answered, 1.0).coverage.n == 30
