"""Steps of a reply: as text, and as spans of token ids."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny_models
from selfeval.judging.steps import split_steps, step_ends, step_texts

TOKENIZER = tiny_models.words_tokenizer()
FORMS = ("lines", "sentences")
PIECES = st.sampled_from(["A b.", "3.5", " = 7", "\n", "\n\n", " ", "1.", "Why?", "好。", "…", '."', "é", "😀", "Tom has"])
TEXTS = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=12).map("".join))


@pytest.mark.parametrize(
    ("form", "steps"),
    [
        ("sentences", ["3 + 4 = 7.", " Then 7 * 2.5 = 17.5.", " So the answer is 17.5"]),
        ("sentences", ["Well, 3 is few!", ' "Is it?"', " Yes."]),
        ("sentences", ["Step one\n\n", "2. Two steps.", " End"]),
        ("sentences", ["他有三个。", "答案是3。"]),
        ("lines", ["First. Second.\n", "Third\n\n  ", "Fourth\n"]),
        ("lines", ["\n\nOne line"]),
    ],
)
def test_steps_of_texts(form: Any, steps: list[str]) -> None:
    assert split_steps("".join(steps), form) == steps


def test_a_reply_without_text_has_no_steps_or_a_blank_one() -> None:
    assert [split_steps(text, "sentences") for text in ("", " \n ", "1.")] == [[], [" \n "], ["1."]]


@example("。", "sentences")
@given(TEXTS, st.sampled_from(FORMS))
def test_joined_steps_are_the_reply(text: str, form: Any) -> None:
    steps = split_steps(text, form)
    assert "".join(steps) == text
    assert all(step.strip() for step in steps) or len(steps) == 1


@settings(max_examples=50)  # many calls of a tokenizer
@given(TEXTS, st.sampled_from(FORMS), st.booleans())
def test_spans_of_tokens_are_the_steps(text: str, form: Any, finished: bool) -> None:
    ids = [*TOKENIZER.encode(text, add_special_tokens=False), *([tiny_models.EOS] if finished else [])]
    ends = step_ends(ids, TOKENIZER.decode, form, (tiny_models.EOS,))
    assert all(a < b for a, b in pairwise((0, *ends)))
    assert ends[-1:] == ((len(ids),) if ids else ())
    assert "".join(step_texts(ids, ends, TOKENIZER.decode)) == TOKENIZER.decode(ids)
    # Each step but the last ends where the text of a step ends, or later within the same token.
    lengths = [0]
    for step in split_steps(TOKENIZER.decode(ids[: len(ids) - finished]), form):
        lengths.append(lengths[-1] + len(step))
    for end in ends[:-1]:
        length, last = len(TOKENIZER.decode(ids[:end])), len(TOKENIZER.decode([ids[end - 1]]))
        assert any(0 <= length - of_step < last for of_step in lengths[1:])


def test_a_step_ends_at_its_own_last_token() -> None:
    ids = TOKENIZER.encode("Tom has seven. Verdict: tie. Answer: five", add_special_tokens=False)
    ends = step_ends([*ids, tiny_models.EOS], TOKENIZER.decode, "sentences", (tiny_models.EOS,))
    texts = step_texts([*ids, tiny_models.EOS], ends, TOKENIZER.decode)
    assert texts == ["Tom has seven.", " Verdict: tie.", " Answer: five<eos>"]


def test_a_token_of_two_steps_belongs_to_the_first() -> None:
    words = ["One. Two", "!\n", "Three", "<end>"]
    decode = "".join

    def of(count: list[int]) -> str:
        return decode(words[i] for i in count)

    assert step_ends([0, 1, 2, 3], of, "sentences", (3,)) == (1, 2, 4)
