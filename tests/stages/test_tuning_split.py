from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from selfeval.config import load_config
from selfeval.errors import TextError
from selfeval.quality.dedupe import jaccard, shingles
from selfeval.stages.tuning_split import _cut_end, held_out_conversations, split_texts
from selfeval.stages.tuning_texts import TextFiles


def document(seed: object, length: int = 60) -> str:
    draws = random.Random(str(seed))
    return " ".join(f"word{draws.randrange(500)}" for _ in range(length))


def version(text: str, seed: int) -> str:
    """The same document with one word changed."""
    words = text.split()
    words[seed % len(words)] = f"changed{seed}"
    return " ".join(words)


def closest(text: str, others: list[str]) -> float:
    return max(jaccard(shingles(text), shingles(other)) for other in others)


def test_no_held_out_document_has_a_near_copy_in_the_text_to_train_on() -> None:
    originals = [document(seed) for seed in range(30)]
    documents = originals + [version(text, number) for number, text in enumerate(originals)]
    for seed in range(5):
        split = split_texts(documents, 0.2, str(seed))
        assert sorted([*split.train, *(held.text for held in split.held)]) == sorted(documents)
        assert len(split.held) >= 12
        assert all(closest(held.text, split.train) < 0.8 for held in split.held)
        # A document and its version are one case.
        assert len({held.cluster for held in split.held}) == len(split.held) / 2


def test_a_document_that_is_most_of_the_text_is_trained_on() -> None:
    text = document("often")
    documents = [*(version(text, number) for number in range(40)), *(document(seed, 30) for seed in range(20))]
    split = split_texts(documents, 0.1, "0")
    assert all(each in split.train for each in documents[:40])


def test_documents_that_are_all_near_copies_are_reported_as_such() -> None:
    text = document("often")
    split = split_texts([version(text, number) for number in range(30)], 0.1, "0")
    assert (len(split.train), split.held) == (30, [])
    assert split.refused == sum(map(len, split.train))
    assert split_texts([document(seed) for seed in range(30)], 0.1, "0").refused == 0


def test_the_message_about_near_copies_does_not_ask_for_more_text(tmp_path: Path) -> None:
    text, path = document("often"), tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": version(text, number)}) + "\n" for number in range(30)))
    config = load_config(None, {}, ("tuning.extend_vocabulary=30", "tuning.held_out=0.1"))
    with pytest.raises(
        TextError, match=r"no document can be held out: those that were drawn and their near-copies have [\d,]+ of"
    ):
        TextFiles([path]).check(config)


def test_the_ends_of_a_few_documents_are_held_out_without_copies() -> None:
    lines = [document(seed, 12) + ".\n" for seed in range(100)]
    copies = [version(line, 3) + "\n" for line in lines[:5]]
    text = "".join([*lines[:85], *copies, *lines[85:]])
    split = split_texts([text], 0.25, "0")
    held = "".join(passage.text for passage in split.held)
    assert split.train == [text[: len(split.train[0])]]
    assert not any(copy in held for copy in [*lines[:5]])
    assert all(closest(line, split.train[0].splitlines()) < 0.8 for line in held.splitlines())
    ends = text.removeprefix(split.train[0])
    left_out = [line for line in ends.splitlines(keepends=True) if closest(line, split.train[0].splitlines()) >= 0.8]
    assert split.left_out == sum(map(len, left_out))
    # Every line but the left-out ones, in their order.
    assert held == "".join(line for line in ends.splitlines(keepends=True) if line not in left_out)
    assert 15 <= len({passage.cluster for passage in split.held}) <= 20


def test_the_end_of_a_text_with_long_paragraphs_and_a_last_newline_is_held_out() -> None:
    text = "\n".join(f"{number} " + "words of it " * 150 for number in range(12)) + "\n"
    start, end = _cut_end(text, 0.05)
    assert start + end == text
    assert 0.02 < len(end.strip()) / len(text) < 0.1


def test_a_long_text_has_more_copies_than_its_end() -> None:
    lines = [document(seed, 12) + ".\n" for seed in range(40)]
    split = split_texts(["".join([*lines, *lines])], 0.3, "0")
    assert split.held == []
    assert split.left_out > 0


def test_conversations_that_are_near_copies_stay_together() -> None:
    texts = [document(seed) for seed in range(20)]
    texts += [version(text, number) for number, text in enumerate(texts)]
    for seed in range(5):
        groups = held_out_conversations(texts, list(range(40)), 0.2, str(seed))
        assert all({number % 20 for number in group} == {group[0]} and len(group) == 2 for group in groups)
        assert 6 <= sum(map(len, groups)) <= 12
    assert held_out_conversations(texts, list(range(40)), 0.0, "0") == []


def test_conversations_with_the_same_prompt_stay_together() -> None:
    texts = [document(seed) for seed in range(40)]
    [*groups] = held_out_conversations(texts, [number % 20 for number in range(40)], 0.1, "0")
    assert [{number % 20 for number in group} == {group[0]} for group in groups] == [True, True]
