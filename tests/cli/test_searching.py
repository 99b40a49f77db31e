"""`selfeval search` on a run of the embedded model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from processes import environment
from selfeval.cli.app import app
from selfeval.cli.searching import _as_text
from selfeval.runs.reader import RunReader
from selfeval.runs.search import Found
from selfeval.stages.seeds import read_seeds
from toy import ToyRun

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(toy_run: ToyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(toy_run.folder, tmp_path_factory.mktemp("search") / "run"))


def search(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["search", *arguments, "--quiet"])


def test_a_question_is_nearest_to_its_own_text(folder: Path) -> None:
    asked = RunReader(folder).records("questions")[5]
    found = search(str(folder), asked.text, "--top", "3", "--json")
    assert found.exit_code == 0, found.stderr
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == 3
    assert (rows[0]["id"], rows[0]["text"]) == (asked.id, asked.text)
    assert rows[0]["similarity"] == pytest.approx(1.0, abs=1e-3)
    assert sorted(path.name for path in (folder / "search").iterdir()) == ["questions.faiss", "questions.json"]
    # The text that was searched for is not kept among the vectors of the run.
    before = sorted((folder / "embeddings").rglob("*.safetensors"))
    pairs = search(str(folder), "How many violins?", "--in", "pairs", "--top", "1")
    assert pairs.exit_code == 0, pairs.stderr
    assert [line.split()[0] for line in pairs.stdout.splitlines()[1:]] == ["chosen:", "rejected:"]
    assert sorted((folder / "embeddings").rglob("*.safetensors")) == before


def test_recommended_seeds_are_training_questions(folder: Path, tmp_path: Path) -> None:
    found = search(str(folder), "--recommend", "4")
    assert found.exit_code == 0, found.stderr
    path = tmp_path / "more.jsonl"
    path.write_text(found.stdout, encoding="utf-8")
    train = {question.opening for question in RunReader(folder).records("questions", split="train")}
    assert {seed.question for seed in read_seeds(str(path))} < train
    assert len(found.stdout.splitlines()) == 4


def test_without_a_text_the_index_is_built(folder: Path) -> None:
    found = search(str(folder), "--in", "replies")
    distinct = {reply.text for reply in RunReader(folder).records("replies") if reply.text.strip()}
    assert (found.exit_code, found.stdout) == (0, f"{len(distinct)} texts are indexed in {folder}\n")
    as_json = search(str(folder), "--in", "replies", "--json")
    assert json.loads(as_json.stdout) == {"texts": len(distinct)}


def test_vectors_that_cannot_be_kept_are_a_note_and_not_a_warning(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("embeddings", "search")))
    (copy / "embeddings").write_text("no folder")
    found = CliRunner().invoke(app, ["search", str(copy), "--in", "replies"])
    assert found.exit_code == 0, found.stderr
    assert "vectors are not kept" in found.stderr
    assert "Warning" not in found.stderr


def test_mistakes_are_named_before_the_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'records "verdicts" cannot be searched' in search(str(folder), "x", "--in", "verdicts").stderr
    assert "pass either a text" in search(str(folder), "x", "--recommend", "2").stderr
    for option in (["--in", "pairs"], ["--top", "2"], ["--json"]):
        assert f"{option[0]} cannot be used with --recommend" in search(str(folder), "--recommend", "2", *option).stderr
    assert "--top needs a text" in search(str(folder), "--top", "2").stderr
    assert "is not a run" in search(str(folder / "none"), "x").stderr
    monkeypatch.setitem(sys.modules, "faiss", None)
    refused = search(str(folder), "x")
    assert refused.exit_code == 2
    assert "pip install 'self-evaluator[data]'" in refused.stderr


def test_a_long_text_is_shown_on_one_line() -> None:
    shown = _as_text(Found(0.5, "q1", "first\nline \x1b[31m" + "long " * 100, "q1"))
    assert shown.startswith("0.500  q1  first line ")
    assert shown.endswith("long ...")
    assert "\n" not in shown
    assert "\x1b" not in shown


def test_the_help_imports_no_library_of_the_search() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom selfeval.cli.app import app\n"
        "assert CliRunner().invoke(app, ['search', '--help']).exit_code == 0\n"
        "assert 'numpy' not in sys.modules\n"
        "import selfeval; selfeval.Run\n"
        "print([name for name in ('faiss', 'datasketch', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
