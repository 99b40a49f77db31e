from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tiny_models
from selfeval.backbone.vocabulary.tokenizer import BpeTokenizer, NewToken, expanded
from selfeval.errors import ModelError

DOMAIN = [
    "The patient received amoxicillin. The patient recovered, and amoxicillin was stopped.\n" * 5,
    "患者服用阿莫西林。患者已经康复，阿莫西林停用。😀😀\n" * 5,
]
TEXTS = st.text() | st.lists(st.sampled_from(["amoxicillin", " patient", "阿莫西林", "😀", " ", "\n", "é", "<eos>"])).map(
    "".join
)


KINDS: dict[str, Callable[[], Any]] = {
    "bytes as letters": tiny_models.words_tokenizer,
    "bytes as tokens": tiny_models.bytes_tokenizer,
}


class Extended:
    def __init__(self, base: Any, count: int = 60) -> None:
        self.base, self.values = base, BpeTokenizer(base, "tiny")
        self.first = self.values.first_free
        self.tokens: list[NewToken] = self.values.learn(DOMAIN, count, self.first)
        self.pieces = {self.first + number: token.pieces for number, token in enumerate(self.tokens)}
        self.core = Tokenizer.from_str(json.dumps(self.values.extended(self.tokens, self.first)))

    def encode(self, text: str) -> list[int]:
        return list(self.core.encode(text, add_special_tokens=False).ids)

    def before(self, text: str) -> list[int]:
        return list(self.base.encode(text, add_special_tokens=False))


WORLDS = {name: Extended(made()) for name, made in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_every_text_has_its_old_tokens_or_new_ones_in_place_of_them(kind: str, text: str) -> None:
    world = WORLDS[kind]
    before, after = world.before(text), world.encode(text)
    assert expanded(after, world.pieces) == before
    assert len(after) <= len(before)
    assert world.core.decode(after, skip_special_tokens=False) == world.base.decode(before)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_a_text_survives_the_round_trip(kind: str, text: str) -> None:
    world = WORLDS[kind]
    read = text.replace("▁", " ") if kind == "bytes as tokens" else text  # SentencePiece's sign for a space
    assert world.core.decode(world.encode(text), skip_special_tokens=False) == read


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_domain_become_one_token(kind: str) -> None:
    world = WORLDS[kind]
    for word in (" amoxicillin", " patient"):
        assert len(world.before(word)) > 3
        assert len(world.encode(f"the{word}")) == 1 + len(world.encode("the")), word
    assert len(world.encode("患者")) <= 2 < len(world.before("患者"))
    assert all(world.core.token_to_id(token.text) == index for index, token in zip(world.pieces, world.tokens, strict=True))
    assert len({token.text for token in world.tokens} | set(world.base.get_vocab())) == len(world.tokens) + len(world.base)


@pytest.mark.parametrize("kind", KINDS)
def test_no_new_token_crosses_a_word_or_a_part_of_a_character(kind: str) -> None:
    world = WORLDS[kind]
    for index in world.pieces:
        text = world.core.decode([index], skip_special_tokens=False)
        assert " " not in text[1:], text
        assert text.isprintable() or set(text) == {"\n"} or set(text) == {"\ufffd"}, text  # � alone: a part of a character
        assert not (any(sign.isalpha() for sign in text) and any(sign in ".。，\n" for sign in text)), text


def test_control_tokens_keep_their_ids_also_behind_the_vocabulary() -> None:
    base = tiny_models.words_tokenizer()
    base.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    index = base.convert_tokens_to_ids("<|user|>")
    assert index == len(base) - 1
    world = Extended(base)
    assert world.first == index + 1
    assert world.core.token_to_id("<|user|>") == index
    assert world.encode("amoxicillin<|user|>")[-1] == index


def test_markers_of_the_chat_template_keep_their_tokens() -> None:
    base = tiny_models.words_tokenizer()
    base.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    values = BpeTokenizer(base, "tiny")
    text = "<|user|" + "> |user| " * 50  # the marker itself is never learnt from, but its parts are
    core = Tokenizer.from_str(json.dumps(values.extended(values.learn([text], 20, values.first_free), values.first_free)))
    marker = core.encode("<|user|>", add_special_tokens=False).ids
    assert marker == base.encode("<|user|>", add_special_tokens=False)
    assert len(core.encode(" |user|").ids) < len(base.encode(" |user|"))


def test_a_unit_that_is_a_token_by_its_text_has_the_pieces_of_the_text() -> None:
    """Llama 3 looks a whole unit up before it merges."""
    base = tiny_models.words_tokenizer()
    values = json.loads(base.backend_tokenizer.to_str())
    values["model"]["ignore_merges"] = True
    world = Extended(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values))))
    for text in (*DOMAIN, "amoxicillin", "Thepatient recovered"):
        assert expanded(world.encode(text), world.pieces) == world.before(text)
    assert len(world.tokens) > 20


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "is a Unigram model"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "is a WordPiece model"),
    ],
)
def test_other_kinds_are_refused(model: Any, message: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(ModelError, match=message):
        BpeTokenizer(tokenizer, "tiny")


def test_a_tokenizer_of_another_library_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the tokenizer of chatglm \(Own\) is not one of the library tokenizers"):
        BpeTokenizer(type("Own", (), {})(), "chatglm")  # type: ignore[arg-type]
