"""Turns in the worker: large requests are split, and end when their client has left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from selfeval.serve.embeddings import embedded_parts
from selfeval.serve.limits import Limits
from selfeval.serve.worker import Worker


class Lengths:
    """An evaluator whose score is the length of the reply.

    Attributes:
        passes: replies of each pass.
        each: is called in each pass.
    """

    def __init__(self) -> None:
        self.passes: list[list[str]] = []
        self.each: Callable[[], Any] = lambda: None

    def unanswered(self, questions: list[str]) -> list[str]:
        return []

    def score(self, questions: list[str], replies: list[str]) -> list[float]:
        assert len(questions) == len(replies)
        self.passes.append(replies)
        self.each()
        if "bad" in replies:
            raise ValueError("bad")
        return [float(len(reply)) for reply in replies]


@contextmanager
def started(worker: Worker) -> Iterator[None]:
    worker.start()
    yield
    worker.stop(timeout=10)


def worker_of(evaluator: Lengths) -> Worker:
    run: Any = SimpleNamespace(guides={}, evaluator=evaluator, context=None)
    return Worker(run, Limits())


def test_many_texts_are_scored_in_several_passes() -> None:
    evaluator = Lengths()
    worker = worker_of(evaluator)
    large, small = ["x" * n for n in range(150)], ["y", "yy"]
    futures = [worker.score(texts, texts) for texts in (large, small)]
    with started(worker):
        assert [future.result(10) for future in futures] == [[*map(len, large)], [1, 2]]
    # The rest of the large request, 22 texts, has room for the small one.
    assert [len(replies) for replies in evaluator.passes] == [64, 64, 24]


def test_a_request_whose_client_has_left_is_not_scored_further() -> None:
    evaluator = Lengths()
    worker = worker_of(evaluator)
    large = worker.score(["x"] * 150, ["x"] * 150)
    evaluator.each = large.cancel
    with started(worker):
        assert worker.score(["q"], ["yy"]).result(10) == [2]
    assert [len(replies) for replies in evaluator.passes] == [64, 1]


def test_an_error_is_that_of_its_request_alone() -> None:
    worker = worker_of(Lengths())
    good, bad = worker.score(["q"], ["yy"]), worker.score(["q"], ["bad"])
    with started(worker):
        assert good.result(10) == [2]
        with pytest.raises(ValueError, match="bad"):
            bad.result(10)


def test_calls_take_turns_and_end_when_they_are_cancelled() -> None:
    done: list[str] = []
    worker = worker_of(Lengths())
    a = worker.call([lambda n=n: done.append(f"a{n}") for n in range(3)])  # type: ignore[misc]
    b = worker.call([lambda: done.append("b0"), lambda: c.cancel()])
    c = worker.call([lambda n=n: done.append(f"c{n}") for n in range(3)])  # type: ignore[misc]
    with started(worker):
        assert (a.result(10), b.result(10)) == ([None] * 3, [None, True])
        assert worker.call([lambda: 5]).result(10) == [5]
    assert done == ["a0", "b0", "c0", "a1", "a2"]


def test_inputs_to_embed_are_split_by_their_padded_tokens() -> None:
    rows = [[1] * length for length in (5, 3, 9, 1, 12)]
    parts = embedded_parts(rows, most=10)
    # 5 and 3 are padded to 2 * 5 tokens, 9 and 1 would be to 2 * 9, and 12 is more than the limit alone.
    assert [[len(row) for row in part] for part in parts] == [[5, 3], [9], [1], [12]]
