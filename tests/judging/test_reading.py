from __future__ import annotations

import re

import pytest

from selfeval.judging.labels import Labels
from selfeval.judging.reading import find_verdict, is_refusal, thinking_of, token_at

LABELS = Labels(lead="Verdict:", first=" A", second=" B", tie=" tie")
REFEREE = Labels(lead="Better response:", first=" 1", second=" 2", tie=" neither")
MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)


def read(text: str, labels: Labels = LABELS, *, finished: bool = True) -> str | None:
    place = find_verdict(text, labels, finished=finished)
    return None if place is None else re.split(r"\W", text[place.label :])[0]


@pytest.mark.parametrize(("start", "close"), MARKERS)
def test_the_answer_begins_after_the_thinking(start: str, close: str) -> None:
    text = f"{start}Perhaps Verdict: A?{close}Reply B is right."
    end = thinking_of(text).end
    assert end is not None
    assert text[end:] == "Reply B is right."


@pytest.mark.parametrize(("start", "close"), MARKERS)
def test_a_block_that_is_still_open_has_no_answer(start: str, close: str) -> None:
    assert thinking_of(f"{start}Verdict: A").end is None
    assert thinking_of(f"One.{close}Two. {start}Verdict: A").end is None


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n<think>\n", "<|start|>assistant", "...[THINK]"])
def test_a_block_that_the_prompt_opens(prompt: str) -> None:
    thinking = thinking_of("Verdict: A", prompt)
    assert thinking.end is None
    assert thinking.close in ("</think>", "<|channel|>final<|message|>", "[/THINK]")
    assert thinking_of(f"Verdict: A{thinking.close}Verdict: B", prompt).end == len("Verdict: A") + len(thinking.close)


def test_without_markers_everything_is_the_answer() -> None:
    assert thinking_of("I think A.", "<think>\n\n</think>\n\n").end == 0


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("5. Verdict: B", "B"),
        ("Verdict: A? No, 2 + 3 = 5.\nVerdict: B", "B"),
        ("**Verdict:** B", "B"),
        ("**Verdict: B**", "B"),
        ("**Verdict**: B", "B"),
        ("verdict: Tie.", "Tie"),
        ("VERDICT:B", "B"),
        ('I must say "Verdict: A", "Verdict: B" or "Verdict: tie".\nVerdict: B', "B"),
        ('Verdict: B\n(I had to choose from "Verdict: A" and "Verdict: tie".)', "B"),
        ('I must say "Verdict: A", "Verdict: B" or "Verdict: tie".', None),
        ('So my answer is "Verdict: B".', "B"),
        ("Verdict: a close call", None),
        ("Verdict: Both are fine", None),
        ("A is right, B is not.", None),
    ],
)
def test_the_last_statement_of_a_finished_judge_decides(text: str, verdict: str | None) -> None:
    assert read(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("2 + 3 = 5.\nVerdict: B\nQuestion: and", "B"),
        ("Verdict: B\nQuestion: what?\nVerdict: A\n", "B"),  # a base model that writes the next example too
        ("**Verdict: B**<|im_end|>\nmore", "B"),
        ("Reply A says five. Verdict: A seems", None),
        ("Verdict: A", None),  # the next token might be " or", or "?"
        ('say "Verdict: A" or\n', None),
    ],
)
def test_a_judge_that_was_cut_off_decides_only_on_a_line_of_its_own(text: str, verdict: str | None) -> None:
    assert read(text, finished=False) == verdict


@pytest.mark.parametrize("label", ["1", "2", "neither"])
def test_the_referees_words(label: str) -> None:
    assert read(f"Better response: 1 or 2?\nBetter  response: {label}", REFEREE) == label


def test_tokens_before_a_character() -> None:
    tokens = ["Ver", "dict:", " B", "\n"]
    decode = lambda count: "".join(tokens[:count])  # noqa: E731
    assert [token_at(decode, 4, c) for c in (0, 2, 3, 8, 9, 10, 11)] == [0, 0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't compare these replies.", True),
        ("I\u2019m sorry, I will not.", True),
        ("Unfortunately, I am unable to determine which one is better.", True),
        ("As an AI language model, I cannot judge people.", True),
        ("抱歉，我无法比较这两份解答。", True),
        ("I cannot find a mistake in reply A.", False),
        ("Sorry is what reply A says.", False),
        ("Reply A says: I'm sorry, but I can't help.", False),
        ("As an AI would, let me think.", False),
        ("我不能确定第一步，所以再算一遍。", False),
    ],
)
def test_a_refusal_begins_the_answer_and_names_the_task(text: str, refused: bool) -> None:
    assert is_refusal(text) is refused
