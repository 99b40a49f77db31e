"""Searching the records of a run, and the index that it keeps in the run folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfeval.errors import InputError, RunFolderError
from selfeval.records import Question, Split
from selfeval.runs.reader import RunReader
from selfeval.runs.search import RunSearch, index_path
from selfeval.store import RunStore
from view_runs import ViewRun
from word_counts import WordCounts

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture
def made() -> ViewRun:
    return ViewRun()


@pytest.fixture
def folder(made: ViewRun, tmp_path: Path) -> Path:
    return made.write(tmp_path / "run")


def search_of(folder: Path, embedder: WordCounts | None = None, **options: Any) -> RunSearch:
    return RunSearch(RunReader(folder), embedder or WordCounts(), **options)


def test_a_question_is_found_by_its_words(folder: Path) -> None:
    found = search_of(folder).search("please say what is 7 plus 7", count=3)
    assert [found[0].id, found[0].question_id, found[0].text] == ["q7", "q7", "What is 7 plus 7?"]
    similarities = [one.similarity for one in found]
    assert similarities == sorted(similarities, reverse=True)
    assert found[0].as_json() == {"similarity": similarities[0], "id": "q7", "text": "What is 7 plus 7?", "question_id": "q7"}
    assert search_of(folder).search("What is 7 plus 7?", count=1)[0].similarity == pytest.approx(1.0, abs=1e-6)


def test_a_reply_is_found_once(folder: Path, made: ViewRun) -> None:
    found = search_of(folder).search("The answer is 10.", "replies", 100)
    assert (found[0].text, found[0].id, found[0].question_id) == ("The answer is 10.", "q5-r0", "q5")
    texts = [one.text for one in found]
    assert sorted(texts) == sorted({reply.text for reply in made.replies})


def test_a_reply_with_a_text_that_occurs_twice_is_the_first_one(folder: Path, made: ViewRun) -> None:
    store = RunStore(folder)
    store.write_shard("replies", 9, [replace(made.replies[0], id="again", text=made.replies[3].text)])
    store.close()
    found = search_of(folder).search(made.replies[3].text, "replies", 1)
    assert found[0].id == made.replies[3].id


def test_pairs_are_found_by_their_questions(folder: Path, made: ViewRun) -> None:
    found = search_of(folder).search("What is 5 plus 5?", "pairs", 3)
    pair = next(pair for pair in made.pairs if pair.question_id == "q5")
    first = found[0]
    assert (first.id, first.text, first.chosen, first.rejected) == ("q5", pair.prompt, pair.chosen, pair.rejected)
    assert first.confidence == pair.confidence
    kept = {pair.question_id for pair in made.pairs}
    # q2, q3, q4 and others have questions and no kept pair.
    assert {one.question_id for one in search_of(folder).search("What is 2 plus 2?", "pairs", 100)} == kept
    assert len(kept) < len(made.questions)


def test_the_most_confident_pair_of_a_question_comes_first(folder: Path, made: ViewRun) -> None:
    pair = next(pair for pair in made.pairs if pair.question_id == "q5")
    more = [replace(pair, confidence=value, chosen=str(value)) for value in (0.6, 0.999)]
    store = RunStore(folder)
    store.write_shard("pairs/train", 8, more)
    store.close()
    found = search_of(folder).search("What is 5 plus 5?", "pairs", 2)
    assert [one.confidence for one in found] == [0.999, pair.confidence]


def test_texts_are_embedded_once(folder: Path, made: ViewRun) -> None:
    embedder, told = WordCounts(), []
    search_of(folder, embedder, report_progress=lambda *count: told.append(count)).search("five")
    assert [len(call) for call in embedder.calls] == [len(made.questions), 1]
    assert told == [(0, len(made.questions)), (len(made.questions), len(made.questions))]
    later = WordCounts()
    assert search_of(folder, later).search("five", "pairs")
    assert later.calls == [["five"]], "the saved index is opened"


def test_an_index_of_another_embedder_or_of_fewer_questions_is_not_used(folder: Path) -> None:
    search_of(folder).search("five")
    other = WordCounts("other")
    search_of(folder, other).search("five")
    assert [len(call) for call in other.calls] == [24, 1]
    store = RunStore(folder)
    store.write_shard("questions", 9, [Question("new", "How many wheels has a car?", Split.TRAIN, "self")])
    store.close()
    assert search_of(folder, other).search("wheels of a car", count=1)[0].id == "new"


def test_a_run_in_progress_is_searched_and_not_changed(folder: Path) -> None:
    store = RunStore(folder)
    try:
        store.update_run(status="running")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert search_of(folder).search("five", "replies")
        after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    finally:
        store.close()
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {"search"}


def test_a_folder_that_is_not_writable_is_searched_without_saving(folder: Path) -> None:
    (folder / "search").write_text("in the way of the folder", encoding="utf-8")
    notes: list[str] = []
    assert search_of(folder, note=notes.append).search("What is 7 plus 7?", count=1)[0].id == "q7"
    assert [note.split(":")[0] for note in notes] == ["the index is not saved, so the next search builds it again"]


def test_a_damaged_index_is_built_again(folder: Path) -> None:
    search_of(folder).search("five")
    path = index_path(folder, "questions")
    path.write_bytes(path.read_bytes()[:100])
    assert search_of(folder).search("What is 7 plus 7?", count=1)[0].id == "q7"
    assert len(path.read_bytes()) > 100


def test_records_that_are_not_there_yet_are_named(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.update_run(status="running", config=json.loads(_config()))
    store.close()
    with pytest.raises(RunFolderError, match="has no questions yet"):
        search_of(tmp_path).search("five")


def _config() -> str:
    from selfeval.config import RunConfig

    return RunConfig().model_dump_json()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" ",), "the text to search for is empty"),
        (("five", "questions", 0), "must be at least 1, got 0"),
        (("five", "drops"), 'records "drops" cannot be searched; use questions, replies, pairs'),
    ],
)
def test_what_cannot_be_searched_is_said(folder: Path, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        search_of(folder).search(*arguments)
