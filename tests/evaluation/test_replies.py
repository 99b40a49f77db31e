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


def test_the_diversity_of_the_replies_to_a_question_has_intervals() -> None:
    """As in tests/quality/test_reply_diversity.py: distinct words 4 of 6 and 3 of 6; one of two pairs is identical."""
    assert measure_replies(96, [], [], []).per_question is None
    assert measure_replies(96, [], [], [], [["alone"], []]).per_question is None
    found = measure_replies(96, [], [], [], [["A b c.", "a b, d"], ["One two three", "one two THREE!"], ["alone"]]).per_question
    assert found is not None
    assert found.distinct_1 == mean_figure([4 / 6, 1 / 2])
    assert (found.identical.value, found.identical.n) == (0.5, 2)
    assert found.overlap.ci_low is not None
    assert found.overlap.ci_low < 0.75 < found.overlap.ci_high


def test_before_and_after_training_are_not_exchanged() -> None:
    found = measure_replies(96, [], [True, False, False, False], [True, True, True, False])
    assert found.unfinished_before == proportion([False, True, True, True])
    assert found.unfinished_after == proportion([False, False, False, True])
