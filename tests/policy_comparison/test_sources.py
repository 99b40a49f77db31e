"""Files of replies, and the questions that policies share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from selfeval.errors import DataError, InputError
from selfeval.policy_comparison.comparing import compare
from selfeval.policy_comparison.sources import Source, read_source, shared_questions
from selfeval.records import Question, Split


def _file(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _replies(path: Path, *questions: str) -> Path:
    return _file(path, *({"question": question, "reply": f"To {question}"} for question in questions))


def _run(name: str, test: Sequence[str], train: Sequence[str] = ()) -> Source:
    asked = tuple(Question(str(n), text, Split.TEST, "self") for n, text in enumerate(test))
    return Source(name, "policy", Path(name), asked, {}, frozenset(train), name)


def _texts(sources: Sequence[Source], file: Path | None = None, limit: int | None = None) -> list[str]:
    return [question.text for question in shared_questions(sources, file, limit).used]


def test_a_file_is_read_with_its_replies(tmp_path: Path) -> None:
    source = read_source(str(_replies(tmp_path / "other.jsonl", "Why?", "How?")))
    assert source.kind == "file"
    assert source.replies == {"Why?": ("To Why?", True), "How?": ("To How?", True)}
    both = _file(tmp_path / "both.jsonl", {"question": "Why?", "reply": "So."}, {"question": "Why?", "reply": "Because."})
    with pytest.raises(DataError, match="has 2 different replies to the question of line 1; a comparison needs one"):
        read_source(str(both))
    for name in (str(tmp_path / "none"), f"{tmp_path / 'both.jsonl'}@base"):
        with pytest.raises(InputError, match="is neither a run folder nor a file of replies"):
            read_source(name)


def test_common_test_questions_are_test_questions_of_every_run(tmp_path: Path) -> None:
    one, two = _run("one", ["a", "b", "c", "d"]), _run("two", ["d", "b", "x"], train=["c"])
    other = read_source(str(_replies(tmp_path / "other.jsonl", "b", "c", "d")))
    assert _texts([one, two]) == ["b", "d"]
    assert _texts([one, other]) == _texts([other, one]) == ["b", "c", "d"]
    assert shared_questions([other, one]).missing == 1  # "a"
    assert shared_questions([one, two]).missing == 0
    assert _texts([one, two, other], limit=1) == ["b"]
    assert shared_questions([one, two, other], limit=1).common == 2


def test_questions_of_a_file_that_a_policy_was_trained_on_are_left_out(tmp_path: Path) -> None:
    asked = _file(tmp_path / "asked.jsonl", *({"question": q} for q in ("new", "known", "unanswered")))
    runs = [_run("one", ["a"], train=["known"]), _run("two", ["b"])]
    found = shared_questions(runs, asked)
    assert [q.text for q in found.used] == ["new", "unanswered"]
    assert (found.trained, found.missing) == (1, 0)
    other = read_source(str(_replies(tmp_path / "other.jsonl", "new", "known")))
    found = shared_questions([*runs, other], asked)
    assert [q.text for q in found.used] == ["new"]
    assert (found.trained, found.missing) == (1, 1)


def test_no_common_question_is_refused_with_its_cause(tmp_path: Path) -> None:
    one, two = _run("one", ["a"]), _run("two", ["b"], train=["a"])
    with pytest.raises(DataError, match=r"no test question in common \(one has 1, two has 1\)"):
        shared_questions([one, two])
    asked = _file(tmp_path / "asked.jsonl", {"question": "a"})
    with pytest.raises(DataError, match="a policy was trained on each of the 1 common questions"):
        shared_questions([one, two], asked)
    other = read_source(str(_replies(tmp_path / "other.jsonl", "b")))
    with pytest.raises(DataError, match="none of the 1 test questions"):
        shared_questions([one, other], asked)


def test_arguments_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    for policies, judges, message in (
        (["a"], ["referee"], "needs at least two policies, got 1"),
        (["a", "b", "a"], ["referee"], "a is given twice"),
        (["a", "b"], ["refree"], 'no judge "refree".*referee'),
        (["a", "b"], [], "one or more different judges, got none"),
        (["a", "b"], ["gold", "gold"], "one or more different judges, got gold, gold"),
    ):
        with pytest.raises(InputError, match=message):
            compare(policies, judges=judges)
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        compare(["a", "b"], limit=0)
    files = [_replies(tmp_path / name, "Why?") for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(InputError, match="files of replies have no judge; pass --judge-run RUN"):
        compare(files)


def test_the_thinking_of_a_reply_in_a_file_is_not_compared(tmp_path: Path) -> None:
    rows = {"Why?": "<think>Because of 12.</think>\nSo.", "How?": "<think>Perhaps", "Who?": "Ann"}
    source = read_source(str(_file(tmp_path / "one.jsonl", *({"question": q, "reply": r} for q, r in rows.items()))))
    assert source.replies == {"Why?": ("So.", True), "How?": ("", False), "Who?": ("Ann", True)}


def test_one_policy_under_two_names_is_refused(tmp_path: Path) -> None:
    path = _replies(tmp_path / "one.jsonl", "Why?")
    with pytest.raises(InputError, match="are the same policy; pass each policy once"):
        compare([path, f"{tmp_path}/../{tmp_path.name}/one.jsonl"], progress=False)
