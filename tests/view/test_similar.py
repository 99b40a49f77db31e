"""Kept pairs of similar questions on the page of a question, from saved vectors."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from processes import environment
from selfeval.quality.vector_index import VectorIndex
from selfeval.runs.reader import RunReader
from selfeval.runs.search import RunSearch, index_path
from selfeval.serve.gate import Access
from selfeval.view.app import make_view
from selfeval.view.opened import OpenedRuns
from view_runs import ViewRun, make_view_run
from word_counts import WordCounts

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")
TITLE = "Kept pairs of similar questions"


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, ViewRun]:
    folder = tmp_path / "shop"
    made = make_view_run(folder)
    RunSearch(RunReader(folder), WordCounts()).search("five")
    return folder, made


def section(folder: Path, question: str) -> str:
    client = TestClient(make_view(OpenedRuns([folder]), Access(None, loopback=True)), base_url="http://127.0.0.1")
    response = client.get(f"/view/run/shop/question/{question}")
    assert response.status_code == 200
    return response.text.partition(TITLE)[2].partition("</section>")[0]


def test_the_nearest_questions_with_kept_pairs_are_shown(run: tuple[Path, ViewRun]) -> None:
    folder, made = run
    shown = section(folder, "q3")
    links = re.findall(r"/question/(q\d+)\"", shown)
    texts = {question.id: question.text for question in made.questions}
    kept = {pair.question_id for pair in made.pairs}
    vectors = dict(zip(texts, WordCounts().embed(list(texts.values())), strict=True))
    nearest = sorted(kept - {"q3"}, key=lambda name: -float(vectors[name] @ vectors["q3"]))
    assert links == nearest[:5]
    assert f"similarity {float(vectors[links[0]] @ vectors['q3']):.2f}" in shown
    pair = next(pair for pair in made.pairs if pair.question_id == links[0])
    assert texts[links[0]] in shown
    assert pair.chosen in shown
    assert pair.rejected in shown


def test_a_question_does_not_show_its_own_pair(run: tuple[Path, ViewRun]) -> None:
    folder, made = run
    name = made.pairs[0].question_id
    assert f'/question/{name}"' not in section(folder, name)


def test_without_vectors_the_page_says_how_to_make_them(run: tuple[Path, ViewRun]) -> None:
    folder, _ = run
    index_path(folder, "questions").with_suffix(".json").unlink()
    assert f"To make them: <code>selfeval search {folder}</code>" in section(folder, "q3")


def _write_with_hash(path: Path, name: str, found: str) -> None:
    """Write the index as if it contained another text under a name."""
    index = VectorIndex.open(path)
    assert index is not None
    hashes = (found if key == name else known for key, known in zip(index.contents.keys, index.contents.hashes, strict=True))
    contents = replace(index.contents, hashes=tuple(hashes))
    VectorIndex.build(index.vectors(range(len(index))), contents).save(path)


def test_vectors_of_another_text_are_not_used(run: tuple[Path, ViewRun]) -> None:
    folder, _ = run
    path = index_path(folder, "questions")
    before = re.findall(r"/question/(q\d+)\"", section(folder, "q5"))
    _write_with_hash(path, "q3", "0" * 16)
    assert "To make them:" in section(folder, "q3")
    assert re.findall(r"/question/(q\d+)\"", section(folder, "q5")) == before
    _write_with_hash(path, before[0], "1" * 16)
    after = re.findall(r"/question/(q\d+)\"", section(folder, "q5"))
    assert after[:4] == before[1:]


def test_an_edited_index_is_not_used(run: tuple[Path, ViewRun]) -> None:
    folder, _ = run
    found = VectorIndex.open(index_path(folder, "questions"))
    assert found is not None
    path = index_path(folder, "questions").with_suffix(".json")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(found.contents.hashes[3], "0" * 16), encoding="utf-8")
    assert "To make them:" in section(folder, "q5")


def test_a_question_that_was_not_judged_has_no_such_section(run: tuple[Path, ViewRun]) -> None:
    folder, made = run
    judged = {verdict.question_id for verdict in made.verdicts}
    name = next(question.id for question in made.questions if question.id not in judged)
    assert section(folder, name) == ""


def test_no_model_library_is_loaded(run: tuple[Path, ViewRun]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from selfeval.view import similar\n"
        "assert 'faiss' not in sys.modules\n"
        "assert similar._opened(Path(sys.argv[1])) is not None\n"
        "print([name for name in ('torch', 'transformers', 'sklearn') if name in sys.modules])"
    )
    path = str(index_path(run[0], "questions"))
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
