"""Do what the tutorial on support says, from top to bottom, with small models and at toy size.

No small model that is everywhere can read a document. The questions are therefore written by a model that strings words of
questions together, and the embedded model takes its place for the run.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigram_chat
from processes import python, selfeval, start
from selfeval.documents.chunks import chunks_of
from selfeval.documents.reading import read_documents
from selfeval.grounding import grounded
from selfeval.quality.passage_questions import passage_reason, share_in, support
from toy import FEW, LAB

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tutorials" / "support.md").read_text(encoding="utf-8")
DOCUMENTS = ROOT / "examples" / "support" / "documents"
MODEL = Path("path", "to", "model")

SIZES = (*FEW, "verdicts.tie=1.0", "verdicts.label_mass=0", "replies.max_new_tokens=24", "verdicts.max_new_tokens=24")
"""Every verdict is kept, so that there is something to train on."""
ASKED = [
    f"{start} {thing} {end}?"
    for start in ("How much does a", "Where do I return a", "Who pays for a", "How long can I keep a")
    for thing in ("cargo bike", "city bike", "stolen bike", "lost key", "monthly pass", "flat tyre", "electric bike")
    for end in ("at the station", "in the app", "per hour", "at night")
]


def _blocks(language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def _commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for block in _blocks("bash") for line in block.splitlines()]


def test_the_tutorial_goes_from_documents_to_a_server() -> None:
    assert [words[0] for words in _commands()] == ["seeds", "check", "run", "show", "show", "score", "serve"]


def test_the_lines_on_the_page_are_passages_of_the_documents() -> None:
    chunks = [chunk for document in read_documents([DOCUMENTS]).documents for chunk in chunks_of(document, 80, _words)]
    written, to_score = (json.loads(block) for block in _blocks("json"))
    sources = {chunk.passage: chunk.source for chunk in chunks}
    assert sources[written["passage"]] == written["source"]
    assert to_score["passage"] in sources
    assert passage_reason(written["question"]) is None
    assert share_in(written["question"], written["passage"]) >= 0.2
    assert support(written["reply"], written["passage"], written["question"]) == 1.0
    assert support(to_score["replies"][1], to_score["passage"], to_score["question"]) == 0.0


def _words(text: str) -> int:
    return len(text.split())


def test_the_layout_on_the_pages_is_that_of_a_run() -> None:
    layout = grounded("QUESTION", "PASSAGE")
    guides = [ROOT / "docs" / folder / "your-own-data.md" for folder in ("guides", "zh/guides")]
    assert all(f"```text\n{layout}\n```" in text for text in (PAGE, *(guide.read_text("utf-8") for guide in guides)))
    assert grounded("问", "资").startswith("请根据以下资料回答。\n")
    [client] = _blocks("python")
    assert r'f"Answer from this passage.\n\n{passage}\n\nQuestion: ' in client


# -- from top to bottom --------------------------------------------------------------------------------------------------


def _at_toy_size(words: list[str]) -> list[str]:
    settings = [part for size in SIZES for part in ("--set", size)]
    return {
        "seeds": [*words, "--count", "14", "--no-check-replies", "--chunk-tokens", "200"],
        "check": [*words, "--minutes", "0.1", "--set", "replies.max_new_tokens=24", "--set", "verdicts.max_new_tokens=24"],
        "run": [*words, *settings],
    }.get(words[0], words)


def _run(words: list[str]) -> str:
    done = selfeval(*_at_toy_size(words))
    # 3: the check recommends no run, as is right for a model that cannot judge.
    assert done.returncode in ((0, 3) if words[0] == "check" else (0,)), (words, done.stdout[-2000:], done.stderr[-4000:])
    return str(done.stdout)


def _serve(words: list[str], folder: Path) -> str:
    """Return what the client on the page prints."""
    [client] = _blocks("python")
    server = start([*words, "--port", "0"])
    try:
        log = ""
        for _ in range(600):
            log = server.written() if hasattr(server, "written") else ""
            if "Serving" in log or server.poll() is not None:
                break
            time.sleep(0.5)
        port = re.search(r"127\.0\.0\.1:(\d+)", log)
        assert port, log
        done = python(client.replace(":8000", f":{port[1]}"), cwd=folder)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)
    finally:
        server.kill()


@pytest.mark.slow
def test_the_tutorial_works_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DOCUMENTS, tmp_path / "examples" / "support" / "documents")
    (tmp_path / "replies.jsonl").write_text([*_blocks("json")][1], encoding="utf-8")
    seeds, *others, serve = _commands()
    bigram_chat.write(MODEL, ASKED)
    _run(seeds)
    shutil.rmtree(MODEL)
    shutil.copytree(LAB / "word_problems", MODEL)
    printed = {words[0]: _run(words) for words in others}
    written = [json.loads(line) for line in (tmp_path / "seeds.jsonl").read_text("utf-8").splitlines()]
    questions = [
        json.loads(line)
        for shard in (tmp_path / "runs" / "support" / "questions").glob("shard-*.jsonl")
        for line in shard.read_text("utf-8").splitlines()
    ]
    assert {question["text"] for question in questions} == {grounded(row["question"], row["passage"]) for row in written}
    splits: dict[str, set[str]] = {}
    for row, question in zip(written, questions, strict=True):
        splits.setdefault(row["passage"], set()).add(question["split"])
    assert {len(found) for found in splits.values()} == {1}
    assert set().union(*splits.values()) == {"train", "test"}
    assert len(json.loads(printed["score"])["scores"]) == 2
    ranked = _serve(serve, tmp_path).split()
    assert sorted(ranked[::2]) == ["0", "1"]
