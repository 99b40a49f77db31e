"""How many replies the token limit cut off, against shares counted by hand."""

from __future__ import annotations

from dataclasses import replace

from evidence_records import reply
from selfeval.evaluation.replies import measure_replies
from selfeval.quality.statistics import mean_figure, proportion
from selfeval.records import Reply


def cut(name: str) -> Reply:
    return replace(reply(name, "14 - 5"), finished=False)


def whole(name: str) -> Reply:
    return reply(name, "14 - 5 = 9.")


def test_replies_to_one_question_are_averaged_before_the_interval() -> None:
    replies = [cut("q1-r0"), cut("q1-r1"), whole("q2-r0"), cut("q2-r1"), whole("q3-r0"), whole("q3-r1")]
    found = measure_replies(96, replies, [], [])
    assert found.limit == 96
    assert found.unfinished == mean_figure([1.0, 0.5, 0.0])
    assert (found.unfinished.value, found.unfinished.n) == (0.5, 3)
    assert (found.unfinished_before.value, found.unfinished_before.n) == (None, 0), "nothing was asked: unknown, not 0"


def test_replies_from_a_file_are_no_cases() -> None:
    typed = replace(whole("q1-f0"), sampling_method="file")
    assert measure_replies(96, [typed, cut("q2-r0")], [], []).unfinished == mean_figure([1.0])


def test_before_and_after_training_are_not_exchanged() -> None:
    found = measure_replies(96, [], [True, False, False, False], [True, True, True, False])
    assert found.unfinished_before == proportion([False, True, True, True])
    assert found.unfinished_after == proportion([False, False, False, True])
