"""Seeds from documents, with a model that strings words of questions together; see bigram_chat."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bigram_chat
from selfeval.config import RunConfig
from selfeval.documents import progress as progress_module
from selfeval.documents import questions as questions_module
from selfeval.documents.chunks import Chunk
from selfeval.documents.progress import Progress
from selfeval.documents.questions import complete_reply, in_turn
from selfeval.documents.reading import read_documents
from selfeval.documents.seeding import Seeded, check_target, seeds_from_documents
from selfeval.errors import DataError, InputError, LoopError
from selfeval.quality.dedupe import NearDuplicates
from selfeval.rollout.requests import Rollout
from selfeval.stages.draws import Draws
from selfeval.stages.given import read_given
from selfeval.stages.running import new_config
from selfeval.stages.terminal import Terminal

THINGS = ("city bike", "cargo bike", "helmet", "lock", "battery", "child seat")
ASKED = [
    text
    for n, thing in enumerate(THINGS)
    for text in (
        f"How much does a {thing} cost for {n + 2} hours?",
        f"Where can I return the {thing} on Sunday?",
        f"What happens if my {thing} is stolen at night?",
        f"Who repairs a {thing} that is damaged?",
    )
]
PAGE = (
    "# {0}\n\n## Price\n\nA {0} costs 3 euros per hour and can be rented on Sunday.\n\n"
    "## Theft\n\nA stolen {0} is reported at once, and repairs are free."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bigram_chat.write(tmp_path_factory.mktemp("model") / "bigrams", ASKED)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for thing in THINGS:
        (folder / f"{thing}.md").write_text(PAGE.format(thing))
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    return folder


def config(model: Path, *assignments: str) -> RunConfig:
    return new_config(model=str(model), assignments=["backbone.precision=fp32", *assignments])


def write(model: Path, documents: Path, target: Path, *assignments: str, **changes: Any) -> Seeded:
    options: dict[str, Any] = {"count": 10, "chunk_tokens": None, "checks_replies": False, **changes}
    read = read_documents([documents])
    return seeds_from_documents(config(model, *assignments), read, target, terminal=Terminal(quiet=True), **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_seeds_are_questions_of_a_run_with_their_passages(model: Path, documents: Path, tmp_path: Path) -> None:
    target = tmp_path / "seeds.jsonl"
    done = write(model, documents, target)
    found = rows(target)
    assert len(found) == done.questions == 10
    index = NearDuplicates(0.8)
    for row in found:
        assert set(row) == {"question", "passage", "source"}
        file = (documents / row["source"]["file"]).read_text().split("\n")
        first, last = row["source"]["lines"]
        assert row["passage"] == f"{' > '.join(row['source']['headings'])}\n\n" + "\n".join(file[first - 1 : last])
        assert index.find(row["question"]) is None
        index.add(row["question"], row["question"])
    assert len({outcome.values["source"]["file"] for outcome in done.outcomes[:6]}) == 6
    assert sum(done.by_document.values()) == 10
    dropped = rows(tmp_path / "seeds.dropped.jsonl")
    assert dict(Counter(row["reason"] for row in dropped)) == done.dropped
    assert [(skip.file, "not UTF-8" in skip.reason) for skip in done.skipped] == [("latin.txt", True)]
    assert not (tmp_path / "seeds.jsonl.partial").exists()
    given = read_given(new_config(model=str(model), seeds=target))
    assert given is not None
    assert given.questions[0].text == f"Answer from this passage.\n\n{found[0]['passage']}\n\nQuestion: {found[0]['question']}"


def test_the_seed_decides(model: Path, documents: Path, tmp_path: Path) -> None:
    texts = []
    for number, seed in enumerate((0, 0, 1)):
        write(model, documents, tmp_path / f"{number}.jsonl", f"seed={seed}", count=4)
        texts.append((tmp_path / f"{number}.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_an_interrupted_command_resumes(model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, target = tmp_path / "whole.jsonl", tmp_path / "seeds.jsonl"
    write(model, documents, whole, count=12)
    add, batches = Progress.add, []

    def interrupted(self: Progress, outcomes: Sequence[Any]) -> None:
        add(self, outcomes)
        batches.append(len(outcomes))
        if len(batches) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("selfeval.documents.seeding._MOST_AT_ONCE", 5)
    monkeypatch.setattr(Progress, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(model, documents, target, count=12)
    assert not target.exists()
    with pytest.raises(DataError, match="has the unfinished questions of other documents, another model or other settings"):
        write(model, documents, target, "seed=1", count=12)
    write(model, documents, target, count=12)
    assert batches[0] == 5
    assert target.read_text() == whole.read_text()
    assert not target.with_name("seeds.jsonl.partial").exists()


def test_a_command_that_is_killed_between_its_two_files_resumes(
    model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the default `attempts` and these words, some of 12 questions are dropped.
    whole, target = tmp_path / "whole.jsonl", tmp_path / "seeds.jsonl"
    write(model, documents, whole, count=12)
    write_file, written = progress_module.write_file, []

    def killed(path: Path, content: str) -> None:
        if path == target:
            raise KeyboardInterrupt
        written.append(path.name)
        write_file(path, content)

    monkeypatch.setattr(progress_module, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write(model, documents, target, count=12)
    assert written[-1] == "seeds.dropped.jsonl"
    monkeypatch.setattr(progress_module, "write_file", write_file)
    write(model, documents, target, count=12)
    assert target.read_text() == whole.read_text()
    assert (tmp_path / "seeds.dropped.jsonl").read_text() == (tmp_path / "whole.dropped.jsonl").read_text()


def test_another_precision_does_not_resume(
    model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "remove", lambda self: None)
    write(model, documents, tmp_path / "seeds.jsonl", count=2)
    (tmp_path / "seeds.jsonl").unlink()
    with pytest.raises(DataError, match="another model or other settings"):
        write(model, documents, tmp_path / "seeds.jsonl", "backbone.precision=bf16", count=2)


def test_a_lower_count_takes_the_first_questions(
    model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(model, documents, tmp_path / "whole.jsonl", count=8)
    monkeypatch.setattr(Progress, "remove", lambda self: None)
    write(model, documents, tmp_path / "seeds.jsonl", count=8)
    (tmp_path / "seeds.jsonl").unlink()
    (tmp_path / "seeds.dropped.jsonl").unlink(missing_ok=True)
    write(model, documents, tmp_path / "seeds.jsonl", count=3)
    assert rows(tmp_path / "seeds.jsonl") == rows(tmp_path / "whole.jsonl")[:3]


def test_without_a_usable_question_the_drops_are_kept(documents: Path, tmp_path: Path) -> None:
    stating = bigram_chat.write(tmp_path / "stating", ["The city bike is at the station.", "The helmet is at the depot."])
    with pytest.raises(LoopError, match=r"none of 4 questions about 12 passages was usable \(no_question_mark 4"):
        write(stating, documents, tmp_path / "seeds.jsonl", count=1)
    assert sorted(path.name for path in tmp_path.glob("seeds*")) == ["seeds.failed.jsonl"]
    assert [row["reason"] for row in rows(tmp_path / "seeds.failed.jsonl")] == ["no_question_mark"] * 4
    # As the message advises: again, with another setting.
    with pytest.raises(LoopError, match=r"none of 4 questions .* see .*seeds\.failed\.jsonl"):
        write(stating, documents, tmp_path / "seeds.jsonl", "questions.max_new_tokens=99", count=1)


def test_passages_that_the_context_cannot_hold_are_refused(model: Path, documents: Path, tmp_path: Path) -> None:
    (documents / "long.txt").write_text("A city bike costs a lot. " * 2000)
    with pytest.raises(InputError, match=r"--chunk-tokens 8000: prompt, question and reply take up to \d+ tokens"):
        write(model, documents, tmp_path / "seeds.jsonl", chunk_tokens=8000)


@pytest.mark.parametrize(
    ("name", "message"),
    [("seeds.txt", "use a name such as seeds.jsonl"), ("no/seeds.jsonl", "does not exist"), ("old.jsonl", "is not replaced")],
)
def test_a_target_that_cannot_be_written_is_refused_first(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "old.dropped.jsonl").touch()
    with pytest.raises(InputError, match=message):
        check_target(tmp_path / name)


# -- replies -------------------------------------------------------------------------------------------------------------


def scripted(written: dict[str, tuple[str, str | None]], prompts: list[str], finished: bool = True) -> Any:
    """Return a `generate` that writes the question about a thing, and the reply to it.

    Args:
        written: question and reply of each thing.
        prompts: receives the prompts.
        finished: whether the replies end before the token limit.
    """

    def generate(backbone: Any, requests: Sequence[Any], **options: Any) -> list[Rollout]:
        tokenizer = backbone.loaded.tokenizer
        found = []
        for request in requests:
            prompt = tokenizer.decode(request.prompt.ids)
            prompts.append(prompt)
            thing = max(written, key=lambda thing: prompt.rfind(f"{thing} > "))
            is_reply = request.temperature == 0
            text = written[thing][is_reply]
            assert text is not None, prompt
            found.append(Rollout((*tokenizer.encode(text), 1), (), finished or not is_reply))
        return found

    return generate


def test_questions_are_dropped_by_the_reply_to_them(
    model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scripted model: the first call writes questions, the second one replies to those that are left."""
    written = {
        "city bike": ("How much does a city bike cost per hour?", "It is 3 euros per hour."),
        "cargo bike": ("What is the price of a cargo bike in the passage?", None),
        "helmet": ("How much does a helmet cost on Monday?", "It costs 4 euros."),
        "lock": ("How much is a lock for a week?", "Not in the passage."),
        "battery": ("How much does a city bike cost per hour?", "It is 3 euros per hour."),
        "child seat": ("Who was the first president?", None),
    }
    prompts: list[str] = []
    monkeypatch.setattr(questions_module, "generate", scripted(written, prompts))
    monkeypatch.setattr("selfeval.documents.seeding._FEWEST_AT_ONCE", 12)
    target = tmp_path / "seeds.jsonl"
    done = write(model, documents, target, "questions.attempts=6", count=2, checks_replies=True)
    assert [(row["question"], row["reply"]) for row in rows(target)] == [written["city bike"]]
    assert done.questions == 1
    assert len(done.outcomes) == 12
    reasons = {o.values["source"]["file"].removesuffix(".md"): o.reason for o in done.outcomes[:6]}
    twin = "battery" if reasons["battery"] else "city bike"  # whichever is asked about first
    assert reasons | {twin: "near_duplicate"} == reasons
    assert [reasons[name] for name in ("cargo bike", "helmet", "lock", "child seat")] == [
        "refers_to_passage",
        "not_in_passage",
        "unanswered",
        "unrelated",
    ]


def test_a_reply_that_is_cut_off_is_not_used(
    model: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {thing: (f"How much does a {thing} cost per hour?", "It is 3 euros per hour") for thing in THINGS}
    monkeypatch.setattr(questions_module, "generate", scripted(written, [], finished=False))
    with pytest.raises(LoopError, match=r"\(unfinished_reply \d+"):
        write(model, documents, tmp_path / "seeds.jsonl", count=1, checks_replies=True)


@pytest.mark.parametrize(
    ("text", "finished", "is_chat", "expected"),
    [
        ("It costs 3 euros.\n\nQuestion: What", False, False, ("It costs 3 euros.", True)),
        ("It costs 3", False, False, ("It costs 3", False)),
        ("It costs 3.", True, False, ("It costs 3.", True)),
        ("It costs 3 euros.\n\nA day costs", False, True, ("It costs 3 euros.\n\nA day costs", False)),
        ("It costs 3.\n\nA day is 9.", True, True, ("It costs 3.\n\nA day is 9.", True)),
    ],
)
def test_without_a_chat_template_a_reply_ends_at_a_blank_line(
    text: str, finished: bool, is_chat: bool, expected: tuple[str, bool]
) -> None:
    assert complete_reply(text, finished, is_chat=is_chat) == expected


# -- passages ------------------------------------------------------------------------------------------------------------


def chunk(document: str, number: int, words: int = 9) -> Chunk:
    return Chunk(" ".join(f"word{number}" for _ in range(words)), (), document, "lines", number, number)


def test_the_first_passages_are_spread_over_the_documents() -> None:
    chunks = [chunk(name, number) for name, size in (("a", 9), ("b", 2), ("c", 5)) for number in range(1, size + 1)]
    found = in_turn(chunks, Draws(0))
    assert sorted(found, key=lambda c: (c.document, c.first)) == chunks
    assert Counter(c.document for c in found[:6]) == {"a": 2, "b": 2, "c": 2}
    assert Counter(c.document for c in found[:10]) == {"a": 4, "b": 2, "c": 4}
    assert in_turn(chunks, Draws(0)) == found != in_turn(chunks, Draws(1))


def test_short_passages_are_not_asked_about() -> None:
    assert in_turn([chunk("a", 1, words=7), chunk("a", 2, words=8)], Draws(0)) == [chunk("a", 2, words=8)]
