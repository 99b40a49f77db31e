"""Labels while the run changes: other pairs, other texts, another process, and files that cannot be written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labelled_run import write_run
from selfeval.errors import InputError, StorageError
from selfeval.labelling.label_file import LabelFile
from selfeval.labelling.queue_file import QUEUE
from selfeval.labelling.threshold_file import THRESHOLD
from selfeval.runs.labelling import LabelSession, LabelTask
from selfeval.runs.reader import RunReader
from selfeval.runs.search import RunSearch
from selfeval.store import RunStore
from word_counts import WordCounts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mine")


def answer(task: LabelTask, rater: str, count: int) -> None:
    session = LabelSession(task, rater, count)
    while (shown := session.next_pair()) is not None:
        session.answer(shown, "first" if shown.first.endswith("-r0") else "second")


def test_labels_of_an_earlier_set_of_pairs_are_unused_and_asked_again(run: Path) -> None:
    answer(LabelTask(run), "ann", 3)
    earlier = (run / QUEUE).read_bytes()
    write_run(run, pairs=7)
    task = LabelTask(run)
    assert (task.agreement().labelled, task.agreement().unused) == (0, 3)
    assert LabelSession(task, "ann").progress == (0, 7)
    answer(task, "ann", 7)
    # A second answer to the same texts replaces the first, so nothing is unused in the end.
    assert (task.agreement().labelled, task.agreement().unused) == (7, 0)
    assert [path.read_bytes() for path in run.glob("label_queue-*.json")] == [earlier]


def test_labels_keep_counting_when_the_evaluator_is_trained_again(run: Path) -> None:
    answer(LabelTask(run), "ann", 3)
    scored = run / "evaluation" / "scored.jsonl"
    scored.write_text(scored.read_text().replace("1.5", "-0.25"))
    found = LabelTask(run).agreement()
    assert (found.labelled, found.unused, found.evaluator.value) == (3, 0, 0.0)


def test_a_task_whose_run_has_changed_saves_nothing(run: Path) -> None:
    session = LabelSession(LabelTask(run), "ann")
    shown = session.next_pair()
    assert shown is not None
    with pytest.raises(InputError, match="have changed since they were shown"):
        session.answer(replace(shown, texts="other"), "first")
    write_run(run, pairs=7)
    answer(LabelTask(run), "bob", 1)
    queue = (run / QUEUE).read_bytes()
    with pytest.raises(InputError, match=r"pairs or the evaluator of .* have changed since they were read"):
        session.answer(shown, "first")
    assert [label.rater for label in LabelFile(run).read()] == ["bob"]
    assert (run / QUEUE).read_bytes() == queue


def test_two_tasks_share_one_saved_queue(run: Path) -> None:
    one, two = LabelTask(run), LabelTask(run)
    answer(one, "ann", 1)
    answer(two, "bob", 1)
    assert one.agreement().raters == {"ann": 1, "bob": 1}
    assert not list(run.glob("label_queue-*.json"))


def test_a_threshold_that_cannot_be_written_does_not_deny_the_answer(run: Path) -> None:
    task = LabelTask(run)
    (run / THRESHOLD).mkdir()
    with pytest.raises(StorageError, match=r"the answer is saved, but the threshold .* is not"):
        answer(task, "ann", 1)
    assert [label.rater for label in LabelFile(run).read()] == ["ann"]


def test_undo_takes_back_the_last_of_equal_answers(run: Path) -> None:
    session = LabelSession(LabelTask(run), "ann")
    shown = session.next_pair()
    assert shown is not None
    for choice in ("first", "tie", "first"):
        session.answer(shown, choice)
    answer(session.task, "bob", 2)
    assert session.undo() == shown
    assert session.undo() is None


# -- the preferred pairs ------------------------------------------------------------------------------------------------


def _index(folder: Path) -> None:
    RunSearch(RunReader(folder), WordCounts()).search("What is 1 + 1?")


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_central_pairs_are_preferred_by_the_vectors_of_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", pairs=8)
    with pytest.raises(InputError, match=r"has no vectors of its questions.*make them: selfeval search"):
        LabelTask(folder, prefer="central")
    _index(folder)
    task, vectors = LabelTask(folder, prefer="central"), WordCounts().embed([f"What is {n} + <b>1</b>?" for n in range(8)])
    expected = np.maximum(vectors @ vectors.T, 0).mean(1)
    assert {draw.pair.question_id: draw.weight for draw in task.queue} == pytest.approx(
        {f"q{n}": float(density) for n, density in enumerate(expected)}, abs=1e-5
    )
    # The saved order is used again, also without the index and without the option.
    session = LabelSession(task, "ann")
    shown = session.next_pair()
    assert shown is not None
    session.answer(shown, "first")
    (folder / "search" / "questions.faiss").unlink()
    assert [d.weight for d in LabelTask(folder).queue] == [d.weight for d in task.queue]
    with pytest.raises(InputError, match='was saved with the first label and prefers "central"; omit the preference "both"'):
        LabelTask(folder, prefer="both")


@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
def test_vectors_of_other_questions_are_not_used(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    _index(folder)
    questions = RunReader(folder).records("questions")
    store = RunStore(folder)
    store.write_shard("questions", 0, [*questions[:-1], replace(questions[-1], text="What was 5?")])
    store.close()
    with pytest.raises(InputError, match="has no vectors of its questions"):
        LabelTask(folder, prefer="both")


def test_preferences_that_do_not_exist_or_do_not_apply_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with pytest.raises(InputError, match='no preference "typical"; use uncertain, central, both'):
        LabelTask(folder, prefer="typical")
    with pytest.raises(InputError, match="omit the preference"):
        LabelTask(folder, prefer="uncertain", for_training=True)
