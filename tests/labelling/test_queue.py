"""The order in which pairs are shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from label_world import is_right, make_pairs, pair, share_right
from selfeval.errors import RunFolderError
from selfeval.labelling.pairs import LabelPair
from selfeval.labelling.queue import UNIFORM, Preference, draw_queue, expected_error, is_turned, training_queue
from selfeval.labelling.queue_file import QUEUE, queue_id, read_preference, read_queue, write_queue
from selfeval.labelling.weights import draw_probabilities, lure_weights
from selfeval.records import VerdictState


def test_the_expected_error_is_that_of_the_less_sure_one() -> None:
    two = math.log(0.9 / 0.1)  # the evaluator's confidence is 0.9
    assert expected_error(pair(0, two, 0.7), 1.0) == pytest.approx(0.3)
    assert expected_error(pair(0, two, 0.95), 1.0) == pytest.approx(0.1)
    assert expected_error(pair(0, 2 * two, 0.95), 2.0) == pytest.approx(0.1)
    assert expected_error(pair(0, two, None), 1.0) == pytest.approx(0.5)
    assert expected_error(pair(0, -two, 0.95), 1.0) == 1.0, "one of them is wrong"


DENSITIES = {"q0": 0.9, "q1": 0.3, "q2": 0.1, "q3": 0.5}


@pytest.mark.parametrize("prefer", ["uncertain", "central", "both"])
def test_every_draw_has_the_probability_that_the_estimates_assume(prefer: Preference) -> None:
    """The first two of four pairs, in 20,000 queues. Each count is binomial: 5 standard deviations, for 12 outcomes."""
    pairs = [pair(0, 3.0, 0.99), pair(1, 0.1, 0.6), pair(2, 1.0, 0.2), pair(3, 2.0, None)]
    queues = [draw_queue(pairs, 1.0, seed, prefer, DENSITIES) for seed in range(20_000)]
    counts = Counter((q[0].pair.texts, q[1].pair.texts) for q in queues)
    weights = {draw.pair.texts: draw.weight for draw in queues[0]}
    for (one, two), count in counts.items():
        others = [w for texts, w in weights.items() if texts not in (one, two)]
        q_N = draw_probabilities([weights[one], weights[two], *others], UNIFORM)
        chance = q_N[0] * q_N[1]
        assert count / 20_000 == pytest.approx(chance, abs=5 * math.sqrt(chance * (1 - chance) / 20_000))
    assert len(counts) == 12


def test_pairs_of_typical_questions_come_early_if_they_are_preferred() -> None:
    pairs = [pair(0, 3.0, 0.99), pair(1, 0.1, 0.6), pair(2, 1.0, 0.2), pair(3, 2.0, None)]
    weights = {prefer: _weights(pairs, prefer) for prefer in get_args(Preference)}
    assert weights["central"] == pytest.approx({"q0": 0.9, "q1": 0.3, "q2": 0.1, "q3": 0.5})
    # The evaluator's confidence is sigmoid(3) and sigmoid(0.1); it disagrees with the judge on q2, and q3 has no verdict.
    errors = {"q0": 1 - 1 / (1 + math.exp(-3)), "q1": 1 - 1 / (1 + math.exp(-0.1)), "q2": 1.0, "q3": 0.5}
    assert weights["uncertain"] == pytest.approx({key: math.sqrt(error) for key, error in errors.items()})
    assert weights["both"] == pytest.approx({key: math.sqrt(error) * DENSITIES[key] for key, error in errors.items()})
    with pytest.raises(ValueError, match="prefer=both needs the densities"):
        draw_queue(pairs, 1.0, 0, "both")
    assert all(draw.weight > 0 for draw in draw_queue(pairs, 1.0, 0, "central", dict.fromkeys(DENSITIES, 0.0)))


def _weights(pairs: Sequence[LabelPair], prefer: Preference) -> dict[str, float]:
    return {draw.pair.question_id: draw.weight for draw in draw_queue(pairs, 1.0, 0, prefer, DENSITIES)}


@pytest.mark.parametrize("prefer", ["uncertain", "central", "both"])
def test_the_estimate_from_the_first_pairs_is_unbiased(prefer: Preference) -> None:
    """The mean of 3,000 estimates from 15 of 60 pairs, where pairs of typical questions are more often right."""
    pairs, better = make_pairs(60, 0)
    densities = {one.question_id: 0.9 if is_right(one, better) else 0.1 + 0.01 * n for n, one in enumerate(pairs)}
    estimates, plain = [], []
    for seed in range(3000):
        queue = draw_queue(pairs, 1.0, seed, prefer, densities)
        q_N = draw_probabilities([draw.weight for draw in queue], UNIFORM)
        right = [float(is_right(draw.pair, better)) for draw in queue[:15]]
        estimates.append(float(np.mean(lure_weights(q_N[:15].tolist(), 60) * np.array(right))))
        plain.append(float(np.mean(right)))
    error = float(np.std(estimates)) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(share_right(pairs, better), abs=4 * error)
    assert abs(np.mean(plain) - share_right(pairs, better)) > 10 * error, "without the weights it is biased"


def test_informative_pairs_come_early_and_every_pair_has_a_chance() -> None:
    pairs = [pair(n, 6.0, 0.999) for n in range(90)] + [pair(n, 0.1, 0.55) for n in range(90, 100)]
    places = Counter[bool]()
    for seed in range(50):
        places.update(draw.pair.margin == 0.1 for draw in draw_queue(pairs, 1.0, seed)[:10])
    share = places[True] / places.total()
    assert share > 0.3, "they are 10% of the pairs"
    assert share < 0.8


def test_the_order_depends_on_the_seed_alone() -> None:
    pairs, _ = make_pairs(30, 0)
    assert draw_queue(pairs, 1.0, 3) == draw_queue(pairs, 1.0, 3)
    assert draw_queue(pairs, 1.0, 3) != draw_queue(pairs, 1.0, 4)
    assert sorted(draw.rank for draw in draw_queue(pairs, 1.0, 3)) == list(range(30))


def test_uniform_draws_follow_the_uniform_order() -> None:
    pairs, _ = make_pairs(200, 0)
    ranks = [draw.rank for draw in draw_queue(pairs, 1.0, 0) if draw.uniform]
    assert ranks == sorted(ranks)
    assert 80 < len(ranks) < 160


def test_no_pairs_have_no_queue() -> None:
    assert draw_queue([], 1.0, 0) == []


def test_training_pairs_without_a_verdict_come_first() -> None:
    states = [VerdictState.KEPT, VerdictState.UNPARSABLE, VerdictState.UNSURE, VerdictState.TIE] * 5
    queue = training_queue([replace(pair(n), state=state) for n, state in enumerate(states)], 0)
    assert [one.state for one in queue[::5]] == [
        VerdictState.UNSURE,
        VerdictState.TIE,
        VerdictState.UNPARSABLE,
        VerdictState.KEPT,
    ]
    assert [one.texts for one in queue] != sorted(one.texts for one in queue)


def test_the_order_of_the_replies_is_random_and_reproducible() -> None:
    pairs, _ = make_pairs(400, 0)
    turned = [is_turned(one, "ann", 0) for one in pairs]
    assert turned == [is_turned(one, "ann", 0) for one in pairs]
    # Binomial(400, 1/2): 5 standard deviations are 50. Two raters agree on half of the orders.
    assert abs(sum(turned) - 200) < 50
    assert abs(sum(a == is_turned(one, "bob", 0) for a, one in zip(turned, pairs, strict=True)) - 200) < 50


# -- the file -----------------------------------------------------------------------------------------------------------


def test_a_queue_keeps_its_draws_when_the_evaluator_is_trained_again(tmp_path: Path) -> None:
    pairs, _ = make_pairs(20, 0)
    queue = draw_queue(pairs, 1.0, 0)
    write_queue(tmp_path, queue)
    trained = [replace(one, margin=-(one.margin or 0.0)) for one in pairs]
    found = read_queue(tmp_path, trained)
    assert found is not None
    assert [(d.pair.key, d.weight, d.rank, d.uniform) for d in found] == [
        (d.pair.key, d.weight, d.rank, d.uniform) for d in queue
    ]
    assert [d.pair.margin for d in found] == [-(d.pair.margin or 0.0) for d in queue]


def test_the_file_says_which_pairs_come_early(tmp_path: Path) -> None:
    pairs, _ = make_pairs(4, 0)
    write_queue(tmp_path, draw_queue(pairs, 1.0, 0))
    assert read_preference(tmp_path) == "uncertain"
    write_queue(tmp_path, draw_queue(pairs, 1.0, 0, "central", {one.question_id: 0.5 for one in pairs}), "central")
    assert read_preference(tmp_path) == "central"
    path = tmp_path / QUEUE
    path.write_text(path.read_text(encoding="utf-8").replace('"prefer"', '"other"'), encoding="utf-8")
    assert read_preference(tmp_path) == "uncertain", "a file of an earlier version"


def test_a_queue_of_other_pairs_is_not_used(tmp_path: Path) -> None:
    pairs, _ = make_pairs(20, 0)
    assert read_queue(tmp_path, pairs) is None
    write_queue(tmp_path, draw_queue(pairs, 1.0, 0))
    assert read_queue(tmp_path, [replace(pairs[0], texts="other"), *pairs[1:]]) is None
    assert read_queue(tmp_path, [*pairs, pair(99)]) is None
    assert read_queue(tmp_path, pairs[1:]) is None


def test_the_file_of_an_earlier_queue_is_kept(tmp_path: Path) -> None:
    pairs, _ = make_pairs(20, 0)
    earlier, later = draw_queue(pairs, 1.0, 0), draw_queue(pairs[1:], 1.0, 0)
    write_queue(tmp_path, earlier)
    written = (tmp_path / QUEUE).read_bytes()
    write_queue(tmp_path, later)
    assert (tmp_path / f"label_queue-{queue_id(earlier)}.json").read_bytes() == written
    found = read_queue(tmp_path, pairs[1:])
    assert found is not None
    assert queue_id(found) == queue_id(later) != queue_id(earlier)


@pytest.mark.parametrize("damage", ['{"draws": [{}]}', '{"draws": 3}', '{"draws', "{}", '{"draws": ["a"]}'])
def test_a_damaged_queue_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / QUEUE).write_text(damage)
    with pytest.raises(RunFolderError, match=r"label_queue\.json is damaged .* backup"):
        read_queue(tmp_path, [pair(0)])
