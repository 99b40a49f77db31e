from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny_models
from selfeval.errors import SeedsError
from selfeval.judging.coverage import check_seeds, coverage
from toy import LAB

CHINESE = ["小明有三个苹果，送给朋友两个，还剩几个？", "树上有5只鸟，飞走2只，还剩几只？"]
GENERAL = ["What is the capital of France?", "Explain how photosynthesis works in simple words."]


def words(*known: str) -> Any:
    """A tokenizer of whole words; all others are unknown."""
    vocabulary = {word: i for i, word in enumerate(("<unk>", "?", *known))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def embedded() -> Any:
    return AutoTokenizer.from_pretrained(LAB / "word_problems")


def test_the_embedded_model_writes_its_own_seeds_well() -> None:
    seeds = [json.loads(line)["question"] for line in (LAB / "seeds.jsonl").read_text().splitlines()]
    found = coverage(embedded(), seeds)
    assert found.lost == 0
    assert found.spelled < 0.1
    assert check_seeds(embedded(), seeds, "embedded") is None


@pytest.mark.parametrize("seeds", [CHINESE, GENERAL], ids=["Chinese", "general"])
def test_seeds_of_another_domain_are_noted_with_the_embedded_model(seeds: list[str]) -> None:
    note = check_seeds(embedded(), seeds, "word_problems")
    assert note is not None
    assert "the tokenizer of word_problems splits" in note
    assert "into single characters" in note


def test_lost_characters_by_hand() -> None:
    # "photosynthesis" has 14 of the 26 characters without white space, and is unknown.
    tokenizer, text = words("How", "does", "work"), "How does photosynthesis work?"
    assert coverage(tokenizer, [text]).lost == pytest.approx(14 / 26)
    note = check_seeds(tokenizer, [text], "m")
    assert note is not None
    assert "loses 54% of the seeds' characters" in note


def test_seeds_of_which_nothing_survives_are_refused() -> None:
    with pytest.raises(SeedsError, match=r"cannot encode the seeds at all .*use a model that was trained on this language"):
        check_seeds(words("How", "does"), ["小明有三个苹果"], "m")


def test_case_and_white_space_may_change() -> None:
    tokenizer = words("how", "many")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert coverage(tokenizer, ["HOW   Many?"]).lost == 0


def test_byte_tokenizers_lose_nothing() -> None:
    assert coverage(tiny_models.words_tokenizer(), [*CHINESE, *GENERAL, "😀"]).lost == 0
