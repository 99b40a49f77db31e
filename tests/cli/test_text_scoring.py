"""`selfeval metrics`: files, output and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfeval.cli.app import app

REPLIES = [f"Tom has {n} red apples and eats one." for n in range(10)]
REFERENCES = [f"Tom has {n} green apples and eats one." for n in range(10)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with texts and references, as plain text and as JSON lines, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name, lines in (("hyp.txt", REPLIES), ("ref.txt", REFERENCES)):
        Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [{"text": a, "reply": [b, a]} for a, b in zip(REPLIES, REFERENCES, strict=True)]
    Path("cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def _run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["metrics", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_scores_and_intervals(files):
    rows = [line.split("\t") for line in _run("hyp.txt", "ref.txt", "--metrics", "rouge1,ter", "--language", "en").splitlines()]
    # Seven of eight words are equal, in every line: the interval has no width. TER splits at spaces.
    assert rows == [["ter (lower is better)", "12.5000", "12.5000 to 12.5000"], ["rouge1", "0.8750", "0.8750 to 0.8750"]]


def test_several_references_and_fields(files):
    several = json.loads(_run("hyp.txt", "ref.txt", "hyp.txt", "--metrics", "rouge1,bleu", "--language", "en", "--json"))
    fields = ("cases.jsonl", "cases.jsonl", "--field", "text", "--reference-field", "reply")
    assert json.loads(_run(*fields, "--metrics", "rouge1,bleu", "--language", "en", "--json")) == several
    assert several["metrics"]["rouge1"]["score"] == {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0, "n": 10}
    assert (several["lines"], several["language"], several["tokenizer"]) == (10, "en", "13a")


def test_differences(files):
    arguments = ("hyp.txt", "ref.txt", "--against", "ref.txt", "--metrics", "rouge1", "--language", "en")
    assert _run(*arguments).split("\t") == ["rouge1", "0.8750", "0.8750 to 0.8750", "1.0000", "-0.1250", "-0.1250 to -0.1250\n"]
    found = json.loads(_run(*arguments, "--json", "--sentences"))["metrics"]["rouge1"]
    assert found["difference"]["value"] == -0.125
    assert found["sentences"] == [0.875] * 10


def test_repetition_needs_no_references(files):
    rows = [line.split("\t") for line in _run("hyp.txt", "--language", "en").splitlines()]
    # Of 80 words seven are the same in all lines, and the numbers are ten more.
    assert rows[0][:2] == ["distinct1", f"{17 / 80:.4f}"]
    assert [row[0] for row in rows] == ["distinct1", "distinct2", "self_bleu (lower is better)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hyp.txt", "none.txt"), "file none.txt does not exist"),
        (("hyp.txt", "short.txt"), "hyp.txt has 10 lines and short.txt 2; line i of each file"),
        (("hyp.txt", "ref.txt", "--against", "short.txt"), "hyp.txt has 10 lines and short.txt 2"),
        (("empty.txt",), "empty.txt is empty"),
        (
            ("hyp.txt", "ref.txt", "--against", "cases.jsonl"),
            'cases.jsonl, line 1: "reply" has 2 texts; a line to score has one',
        ),
        (("hyp.txt", "ref.txt", "--sentences"), "--sentences adds the scores of each line to the JSON output; add --json"),
        (("cases.jsonl",), '"reply" has 2 texts; a line to score has one'),
        (("cases.jsonl", "--field", "txt"), 'cases.jsonl, line 1: missing "txt"'),
        (("bad.jsonl", "--field", "text"), '"text" must be a string or a list of strings, got 3'),
        (("hyp.txt", "ref.txt", "--metrics", "blue"), 'did you mean "bleu"'),
    ],
)
def test_errors(files, arguments, message):
    Path("short.txt").write_text("a\nb\n", encoding="utf-8")
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("bad.jsonl").write_text('{"text": 3}\n', encoding="utf-8")
    assert message in " ".join(_run(*arguments, code=2).split())


def test_blank_lines_are_empty_texts(files):
    Path("blank.txt").write_text("\n".join(["", *REPLIES[1:]]) + "\n", encoding="utf-8")
    found = json.loads(_run("blank.txt", "ref.txt", "--metrics", "rouge1", "--language", "en", "--json", "--sentences"))
    assert found["metrics"]["rouge1"]["sentences"] == [0, *[0.875] * 9]


def test_language_is_named_only_where_it_matters(files):
    """Distinct-n and self-BLEU split words in one way."""
    alone, compared = (CliRunner().invoke(app, ["metrics", *names]).stderr for names in (("hyp.txt",), ("hyp.txt", "ref.txt")))
    assert alone == "10 lines\n"
    assert compared.startswith("10 lines; language en, tokenizer 13a; METEOR aligns")
