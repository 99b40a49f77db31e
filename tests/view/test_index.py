"""The index of a run's records: new, changed, damaged and removed files, and full-text search."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from selfeval.errors import InputError, RunFolderError
from selfeval.runs.reader import RunReader
from selfeval.view import index as indexing
from selfeval.view import query as querying
from selfeval.view.index import Progress, RunIndex
from selfeval.view.kinds import KINDS
from selfeval.view.query import NONE, Found, find, parse_query
from served import wait_for
from view_runs import ViewRun, make_view_run

LONG = 60.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViewRun]:
    """A run, written once: every file is synchronised with the disk."""
    folder = tmp_path_factory.mktemp("view") / "run"
    return folder, make_view_run(folder)


@pytest.fixture
def run(tmp_path: Path, made: tuple[Path, ViewRun]) -> ViewRun:
    shutil.copytree(made[0], tmp_path / "run")
    return made[1]


@pytest.fixture
def index(tmp_path: Path, run: ViewRun) -> RunIndex:
    return RunIndex(tmp_path / "run", tmp_path / "index.sqlite")


def refreshed(index: RunIndex, folder: Path, *kinds: str) -> Progress:
    return index.refresh(RunReader(folder), kinds or KINDS, LONG)


def found(index: RunIndex, kind: str, **parameters: str) -> tuple[Found, list[dict[str, Any]]]:
    with index.reading() as connection:
        result = find(connection, parse_query(KINDS[kind], parameters))
        return result, list(index.load(result.records))


def ids(index: RunIndex, kind: str, **parameters: str) -> list[str]:
    return [row.get("id") or row["question_id"] for row in found(index, kind, **parameters)[1]]


def test_every_record_is_indexed_and_read_as_it_is_in_its_file(index: RunIndex, run: ViewRun, tmp_path: Path) -> None:
    progress = refreshed(index, tmp_path / "run")
    assert progress.is_complete
    assert progress.problems == ()
    counts = {kind: found(index, kind)[0].total for kind in KINDS}
    drops = len(run.dropped_questions) + len(run.dropped_verdicts)
    others = {kind: len(getattr(run, kind)) for kind in KINDS if kind != "dropped"}
    assert counts == {**others, "dropped": drops}
    assert ids(index, "replies") == [reply.id for reply in run.replies]
    assert (tmp_path / "run").is_dir()
    assert not list((tmp_path / "run").rglob("*.sqlite*")), "a run folder is only read"


@pytest.mark.parametrize(
    ("filters", "belongs"),
    [
        ({"state": "tie"}, lambda v: v.state == "tie"),
        ({"split": "test"}, lambda v: v.split == "test"),
        ({"split": "test", "state": "kept"}, lambda v: (v.split, v.state) == ("test", "kept")),
        ({"confidence_min": "0.95"}, lambda v: v.probability is not None and v.confidence >= 0.95),
        ({"confidence_min": "0.5", "confidence_max": "0.6"}, lambda v: v.probability is not None and v.confidence <= 0.6),
        ({"cause": "cut"}, lambda v: "cut" in v.evidence.causes),
        ({"consistent": "no"}, lambda v: v.state == "unsure"),
        ({"consistent": NONE}, lambda v: v.state == "unparsable"),
        ({"question": "q4"}, lambda v: v.question_id == "q4"),
        ({"q": '"says 1"'}, lambda v: v.evidence.raw_output[0].startswith("Judge says 1")),
    ],
)
def test_filters_select_what_a_loop_over_the_records_selects(
    index: RunIndex, run: ViewRun, tmp_path: Path, filters: dict[str, str], belongs: Any
) -> None:
    refreshed(index, tmp_path / "run")
    expected = [verdict.question_id for verdict in run.verdicts if belongs(verdict)]
    assert expected
    assert len(expected) < len(run.verdicts)
    assert ids(index, "verdicts", **filters) == expected


def test_a_reply_has_the_split_of_its_question(index: RunIndex, run: ViewRun, tmp_path: Path) -> None:
    refreshed(index, tmp_path / "run")
    test = {question.id for question in run.questions if question.split == "test"}
    assert ids(index, "replies", split="test") == [reply.id for reply in run.replies if reply.question_id in test]


def test_sorting_puts_records_without_a_value_last_in_both_directions(index: RunIndex, run: ViewRun, tmp_path: Path) -> None:
    refreshed(index, tmp_path / "run")
    rising = [row["probability"] for row in found(index, "verdicts", sort="probability")[1]]
    falling = [row["probability"] for row in found(index, "verdicts", sort="-probability")[1]]
    known = sorted(v.probability for v in run.verdicts if v.probability is not None)
    unknown = [None] * (len(run.verdicts) - len(known))
    assert unknown
    assert rising == [*known, *unknown]
    assert falling == [*reversed(known), *unknown]


def test_pages_divide_the_records_without_gaps(index: RunIndex, run: ViewRun, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(querying, "PAGE", 7)
    refreshed(index, tmp_path / "run")
    pages = [ids(index, "replies", page=str(page), sort="-tokens") for page in range(1, 8)]
    assert [len(page) for page in pages] == [7, 7, 7, 7, 7, 7, 6]
    ordered = sorted(run.replies, key=lambda reply: -len(reply.ids))  # stable: the order of the files within equal ones
    assert [name for page in pages for name in page] == [reply.id for reply in ordered]


def test_counts_of_a_choice_are_under_the_other_filters(index: RunIndex, run: ViewRun, tmp_path: Path) -> None:
    refreshed(index, tmp_path / "run")
    facets = {facet.filter.name: dict(facet.counts) for facet in found(index, "verdicts", split="test", state="tie")[0].facets}
    test = [v.state.value for v in run.verdicts if v.split == "test"]
    assert facets["state"] == {state: test.count(state) for state in set(test)}
    ties = [v.split.value for v in run.verdicts if v.state == "tie"]
    assert facets["split"] == {split: ties.count(split) for split in set(ties)}


# -- search -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["fts5", "like"])
def texts(request: pytest.FixtureRequest, tmp_path: Path, run: ViewRun, monkeypatch: pytest.MonkeyPatch) -> RunIndex:
    """Questions in several languages, searched with and without FTS5."""
    if not request.param:
        monkeypatch.setattr(indexing, "has_full_text", lambda: False)
        monkeypatch.setattr(querying, "has_full_text", lambda: False)
    folder = tmp_path / "run"
    words = ["苹果有多少个？", "100% of AND (x OR y)", 'She said "no way"', "a_b c", "plain NEAR(text)", "semi; DROP TABLE x--"]
    rows = [{"id": f"t{n}", "text": text, "split": "train", "source": "file", "messages": []} for n, text in enumerate(words)]
    shutil.rmtree(folder / "questions")
    (folder / "questions").mkdir()
    (folder / "questions" / "shard-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = RunIndex(folder, tmp_path / "texts.sqlite")
    refreshed(found, folder, "questions")
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("苹果", ["t0"]),
        ("有多少", ["t0"]),
        ("100%", ["t1"]),
        ("0%", ["t1"]),
        ("AND (x OR y)", ["t1"]),
        ('"of AND"', ["t1"]),
        ('"AND of"', []),
        ("and OF", ["t1"]),
        ("no way", ["t2"]),
        ("a_b", ["t3"]),
        ("a_", ["t3"]),
        ("NEAR(text)", ["t4"]),
        ("text plain", ["t4"]),
        ("DROP TABLE x--", ["t5"]),
        ("*", []),
        ('"', ["t0", "t1", "t2", "t3", "t4", "t5"]),
        ("' OR 1=1", []),
        ("col:text", []),
    ],
)
def test_a_search_finds_all_of_its_words_and_nothing_in_it_is_an_operator(
    texts: RunIndex, words: str, expected: list[str]
) -> None:
    assert ids(texts, "questions", q=words) == expected


def test_a_search_reads_the_question_and_the_replies_of_a_verdict_too(index: RunIndex, run: ViewRun, tmp_path: Path) -> None:
    refreshed(index, tmp_path / "run")
    assert ids(index, "verdicts", q='"21 plus"') == ["q21"]
    # Replies of q7 are 14 and 15, one of q3's is 7: "answer is 14." is the first reply of q7 alone.
    assert ids(index, "verdicts", q='"answer is 14."') == ["q7"]
    assert ids(index, "verdicts", q='"answer is 14." "7 plus 7"') == ["q7"]
    assert ids(index, "verdicts", q='"answer is 14." "8 plus 8"') == []


# -- files that change --------------------------------------------------------------------------------------------------


def test_only_new_and_changed_files_are_read_again(index: RunIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = tmp_path / "run", list[str]()
    chunks = indexing._chunks
    monkeypatch.setattr(indexing, "_chunks", lambda path, file: (read.append(path.name), chunks(path, file))[1])
    refreshed(index, folder, "questions")
    assert read == ["shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl"]
    refreshed(index, folder, "questions")
    assert len(read) == 3
    (folder / "questions" / "manifest.json").unlink()
    row = {"id": "new", "text": "Who?", "split": "train", "source": "self", "messages": []}
    (folder / "questions" / "shard-00003.jsonl").write_text(json.dumps(row) + "\n")
    refreshed(index, folder, "questions")
    assert read[3:] == ["shard-00003.jsonl"]
    assert ids(index, "questions", q="Who") == ["new"]


def test_records_of_a_changed_setting_leave_with_their_files(index: RunIndex, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refreshed(index, folder)
    before = found(index, "questions")[0].total
    (folder / "questions").rename(folder / "aside")
    assert refreshed(index, folder).is_complete
    assert found(index, "questions")[0].total == 0
    assert ids(index, "questions", q="plus") == []
    (folder / "aside").rename(folder / "questions")
    refreshed(index, folder)
    assert found(index, "questions")[0].total == before
    assert len(ids(index, "questions", q="plus")) == before


def test_a_damaged_file_is_named_and_the_others_are_shown(index: RunIndex, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = folder / "questions" / "shard-00001.jsonl"
    path.write_text(path.read_text().replace("plus", "minus"))
    progress = refreshed(index, folder, "questions")
    assert progress.is_complete
    assert [problem for problem in progress.problems if "shard-00001.jsonl is damaged" in problem]
    assert len(progress.problems) == 1
    assert ids(index, "questions") == [f"q{n}" for n in (*range(10), *range(20, 24))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "line 2 is damaged"),
        ('{"id": "x"}', "line 2 is damaged (it has no 'text')"),
        ('{"id": ["x"], "text": "x", "split": "train", "source": "self"}', "a list where a text or a number is expected"),
        ('{"id": 9999999999999999999999, "text": "x", "split": "t", "source": "s"}', "does not fit in 64 bits"),
        ("[]", "line 2 is damaged"),
    ],
)
def test_a_damaged_line_is_named(index: RunIndex, tmp_path: Path, line: str, reason: str) -> None:
    folder = tmp_path / "run"
    (folder / "questions" / "manifest.json").unlink()
    good = '{"id": "good", "text": "x", "split": "train", "source": "self"}'
    (folder / "questions" / "shard-00009.jsonl").write_text(f"{good}\n{line}\n")
    problems = refreshed(index, folder, "questions").problems
    assert len(problems) == 1
    assert reason in problems[0]
    assert "good" not in ids(index, "questions"), "a part of a damaged file is not shown"
    assert found(index, "questions")[0].total == 24


def test_half_a_character_is_no_reason_to_fail(index: RunIndex, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "questions" / "manifest.json").unlink()
    row = '{"id": "half", "text": "half \\ud83d of it", "split": "train", "source": "self", "messages": []}'
    (folder / "questions" / "shard-00009.jsonl").write_text(row + "\n")
    assert refreshed(index, folder, "questions").problems == ()
    assert ids(index, "questions", q="half") == ["half"]


def test_a_file_that_was_replaced_after_it_was_indexed_is_not_read_as_the_old_one(index: RunIndex, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refreshed(index, folder, "questions")
    path = folder / "questions" / "shard-00000.jsonl"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RunFolderError, match="was just replaced by the run; reload the page"):
        found(index, "questions")


def test_progress_counts_bytes_until_all_files_are_indexed(index: RunIndex, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    size = sum(path.stat().st_size for path in (folder / "replies").glob("shard-*.jsonl"))
    progress = index.refresh(RunReader(folder), ("replies",), 0)
    assert progress.total == size
    progress = refreshed(index, folder, "replies")
    assert (progress.done, progress.total) == (size, size)


def test_a_thread_that_ends_does_not_report_the_next_one_as_finished(
    index: RunIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, may_end, may_read = tmp_path / "run", threading.Event(), threading.Event()
    chunks, closings = indexing._chunks, list[str]()

    @contextmanager
    def slow_to_end(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        with closing(connection):
            yield connection
            closings.append(threading.current_thread().name)
            if closings == ["selfeval-index"]:
                may_end.wait(LONG)

    monkeypatch.setattr(indexing, "closing", slow_to_end)
    index.refresh(RunReader(folder), ("replies",), 0)
    (first,) = [thread for thread in threading.enumerate() if thread.name == "selfeval-index"]
    wait_for(lambda: closings)
    monkeypatch.setattr(indexing, "_chunks", lambda path, file: may_read.wait(LONG) and chunks(path, file))
    index.refresh(RunReader(folder), ("questions",), 0)
    may_end.set()
    first.join(LONG)
    threading.Timer(0.5, may_read.set).start()
    assert refreshed(index, folder, "questions").is_complete, "it waits for the second thread"


def test_a_query_that_takes_too_long_is_ended(index: RunIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "_QUERY_SECONDS", 0.2)
    numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 100000000) SELECT count(*) FROM n"
    with pytest.raises(InputError, match=r"took longer than 0\.2 s; use fewer words"), index.reading() as connection:
        connection.execute(numbers).fetchone()
    with pytest.raises(sqlite3.OperationalError, match="no such table"), index.reading() as connection:
        connection.execute("SELECT * FROM absent_table")


def test_the_full_text_search_of_this_python_is_found() -> None:
    options = {row[0] for row in sqlite3.connect(":memory:").execute("PRAGMA compile_options")}
    assert indexing.has_full_text() == ("ENABLE_FTS5" in options and sqlite3.sqlite_version_info >= (3, 34))
