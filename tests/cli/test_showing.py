"""`selfeval show --unusual`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfeval.cli.app import app
from selfeval.records import Question, Split, to_json
from selfeval.store import write_sealed

ODD = "Which whales sing under the northern lights?"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with questions alone."""
    texts = [f"Tom has {n} apples and buys {n + 1} more. How many apples has he?" for n in range(8)]
    texts.insert(3, ODD)
    write_sealed(tmp_path / "run.json", {"config": {}})
    (tmp_path / "questions").mkdir()
    rows = [to_json(Question(f"q{n}", text, Split.TRAIN, "self")) for n, text in enumerate(texts)]
    (tmp_path / "questions" / "shard-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_unusual_questions_come_first(run):
    result = CliRunner().invoke(app, ["show", str(run), "questions", "--unusual", "-n", "2", "--json"])
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["text"] == ODD
    assert first["perplexity"] > 3 * second["perplexity"]


def test_other_records_have_no_such_order(run):
    result = CliRunner().invoke(app, ["show", str(run), "replies", "--unusual"])
    assert result.exit_code == 2
    assert "--unusual orders questions, got replies" in result.stderr
