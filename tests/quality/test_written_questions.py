from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from selfeval.quality.question_filters import QuestionFilters
from selfeval.quality.written_questions import bare_question

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
QUESTION = "Tom has 3 pens.\nHow many are left: (a) 1 (b) 2?"


@pytest.mark.parametrize(
    "written",
    [
        "{}",
        "Question: {}",
        "**Question:** {}",
        "**Question**: {}",
        "Q: {}",
        "Q1. {}",
        "### Question 2:\n{}",
        "New question: {}",
        "Sure! Here is a new question:\n\n{}",
        "Sure, here's a question of the same kind:\n{}",
        "Certainly!\n\nQuestion: {}",
        "Of course! Here is another question for you: {}",
        "Here is a similar word problem question: {}",
        "Here's one:\n\n**{}**",
        '"{}"',
        "\u201c{}\u201d",
    ],
)
def test_label_and_preamble_are_removed_and_all_lines_are_kept(written: str) -> None:
    assert bare_question(written.format(QUESTION)) == QUESTION


@pytest.mark.parametrize(
    "question",
    [
        "Here is a list of numbers: 3, 5. What is their sum?",
        "Sure bets pay little. Why?",
        "Question everything: who said so?",
        "What does 'Of course!' mean?",
        'Who said "I came" and "I saw"?',
        "Here is a table:",
        "Great apes: which are they?",
        "Here are some facts about Mary:\n- She has 3 pens.\n- She buys 2.\nHow many has she?",
        "Sure things are rare:\nwhich ones do you know?",
    ],
)
def test_questions_that_begin_alike_are_left_alone(question: str) -> None:
    assert bare_question(question) == question


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I\u2019m ready to help! What would you like to know?", "refusal"),
        ("How can I assist you today?", "refusal"),
        ("Please provide me with more details about the question.", "refusal"),
        ("I cannot write a question without more context.", "refusal"),
        ("As an AI language model, I have no pens. How many pens have you?", "assistant"),
        ("Hello, I'm an AI assistant. Ask me anything.", "assistant"),
        ("How do I say 'I am sorry' in French?", None),
        ("Please provide an example of a metaphor.", None),
        ("What is an AI?", None),
    ],
)
def test_refusals_and_an_assistant_that_talks_about_itself_are_dropped(text: str, reason: str | None) -> None:
    assert QuestionFilters.of(["How many pens are left?"]).reason(text) == reason


@pytest.mark.parametrize(
    ("name", "key"),
    [("math/gsm8k_train.jsonl.xz", "question"), ("instruct/user_oriented_instructions_252.jsonl.xz", "instruction")],
)
def test_real_questions_are_not_changed(name: str, key: str) -> None:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        texts = [str(json.loads(line)[key]).strip() for line in lines]
    changed = [text for text in texts if bare_question(text) != text]
    assert changed == []
