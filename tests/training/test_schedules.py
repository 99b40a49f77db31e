from __future__ import annotations

import pytest

from selfeval.training.schedules import draw, warmup_and_decay


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    # 10 steps, 20% warm-up: 1/2, 2/2, then (10 - step) / 8.
    expected = [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [warmup_and_decay(step, 10, 0.2) for step in range(10)] == pytest.approx(expected)
    assert [warmup_and_decay(step, 2, 0.0) for step in range(2)] == [1.0, 1.0]
    assert [warmup_and_decay(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_every_pass_reads_every_row_once_in_an_order_of_its_own() -> None:
    draws = [index for step in range(6) for index in draw(8, step, 4, "seed")]
    passes = [draws[i : i + 8] for i in (0, 8, 16)]
    assert [sorted(p) for p in passes] == [list(range(8))] * 3
    assert passes[0] != passes[1] != passes[2]
    assert draws != [index for step in range(6) for index in draw(8, step, 4, "another")]


def test_a_batch_may_span_two_passes_and_may_hold_a_row_twice() -> None:
    assert sorted(draw(3, 0, 6, "seed")) == [0, 0, 1, 1, 2, 2]
    # The rows of step n are the n-th window of one endless sequence, whatever the batch.
    assert draw(3, 0, 2, "seed") + draw(3, 1, 2, "seed") + draw(3, 2, 2, "seed") == draw(3, 0, 6, "seed")
