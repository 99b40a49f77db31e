"""The pretraining text must be correct: every label is checked against the oracle, from the text alone."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import selfeval.lab.corpus as corpus
from selfeval.lab.corpus import KINDS, MARKERS, Document, draw_document
from selfeval.lab.domain import LARGEST, NAMES, Step, read_problem
from selfeval.lab.oracle import WordProblems

MODEL = Path(corpus.__file__).parent / "word_problems"
GOLD = WordProblems()


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def _documents(kind: str, count: int) -> list[Document]:
    rng = random.Random(f"corpus/{kind}")
    return [KINDS[kind][0](rng) for _ in range(count)]


def _text(document: Document) -> str:
    return "".join(text for text, _ in document)


@pytest.mark.parametrize(("kind", "labels"), [("judge", ("[A]", "[B]", "[=]")), ("referee", ("(1)", "(2)", "(=)"))])
def test_a_verdict_names_the_reply_that_gold_calls_right(kind: str, labels: tuple[str, str, str]) -> None:
    one, two, _ = (re.escape(label) for label in labels)
    shape = re.compile(
        rf"<\|bos\|><\|{kind}\|>(.+)<\|first\|>(.+){one}<\|second\|>(.+){two}<\|work\|>(.+?)([\[(].[\])])<\|eos\|>"
    )
    seen: Counter[str] = Counter()
    for document in _documents(kind, 2000):
        match = shape.fullmatch(_text(document))
        assert match, _text(document)
        question, first, second, work, label = match.groups()
        right = (GOLD.is_right(question, first), GOLD.is_right(question, second))
        assert None not in right
        assert label == (labels[2] if right[0] == right[1] else labels[0] if right[0] else labels[1])
        assert GOLD.is_right(question, work), "the reference answer is exact"
        seen[label] += 1
    assert all(0.25 < seen[label] / 2000 < 0.42 for label in labels), "no place is favoured"


def test_marks_agree_with_gold_at_the_end_and_with_the_exact_steps_before_it() -> None:
    step = re.compile(r"(\d+) (\+|-|\*|/|plus|minus|times|divided by) (\d+) (?:=|is) (\d+)\.")
    symbol = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    seen: Counter[str] = Counter()
    for document in _documents("grade", 2000):
        text = _text(document)
        prompt, rest = text.removeprefix("<|bos|><|grade|>").split("<|reply|>")
        reply, mark = rest.split("<|eos|>")
        assert mark == ("<|right|>" if GOLD.is_right(prompt, re.sub(r"<\|(right|wrong)\|>", " ", reply)) else "<|wrong|>")
        seen[mark] += 1
        problem = read_problem(prompt)
        assert problem is not None
        exact = [(s.left, s.operator, s.right, s.result) for s in problem.steps]
        written: list[tuple[int, str, int, int]] = []
        for sentence, inner in re.findall(r"([^<]+)(<\|right\|>|<\|wrong\|>|$)", reply):
            for left, operator, right, result in step.findall(sentence):
                written.append((int(left), symbol.get(operator, operator), int(right), int(result)))
            if inner:
                assert inner == ("<|right|>" if written == exact[: len(written)] else "<|wrong|>"), text
                seen["inner"] += 1
    assert 0.45 < seen["<|right|>"] / 2000 < 0.55
    assert seen["inner"] > 500


def test_every_sum_is_marked_as_it_is() -> None:
    line = re.compile(r"(\d+) (\+|-|\*|/|plus|minus|times|divided by) (\d+) (?:=|is) (\d+)\.<\|(right|wrong)\|>")
    symbol = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
    seen: Counter[str] = Counter()
    for document in _documents("sums", 300):
        found = line.findall(_text(document))
        assert len(found) == _text(document).count("<|right|>") + _text(document).count("<|wrong|>") == 12
        for left, operator, right, result, mark in found:
            exact = Step.worked(int(left), symbol.get(operator, operator), int(right)).result
            assert mark == ("right" if exact == int(result) else "wrong")
            seen[mark] += 1
    assert 0.45 < seen["right"] / seen.total() < 0.58  # slips that leave 0..60 are drawn again


def test_a_name_that_is_met_again_weighs_more() -> None:
    again = first = 0
    for document in _documents("ask", 200):
        met: set[str] = set()
        for text, weight in document:
            word = text.strip(" .?")
            if text == "<|ask|>":
                met = set()
            elif word in NAMES:
                again, first = again + (word in met), first + (word not in met)
                assert (weight > 1.0) == (word in met), _text(document)
                met.add(word)
            else:
                assert weight < 1.0
    assert min(again, first) > 100


def test_questions_that_are_taught_are_well_posed() -> None:
    for document in _documents("ask", 500):
        questions = _text(document).removeprefix("<|bos|>").removesuffix("<|eos|>").split("<|ask|>")[1:]
        assert 1 <= len(questions) <= 6
        assert all(GOLD.answer(question) is not None for question in questions)
    for document in _documents("reply", 500):
        question, reply = _text(document).removeprefix("<|bos|><|question|>").removesuffix("<|eos|>").split("<|reply|>")
        assert GOLD.is_right(question, reply) is not None


def test_prompts_weigh_little_and_verdicts_much() -> None:
    for document in _documents("judge", 50):
        weights = dict(document)
        assert weights[document[0][0]] == 0.0
        assert next(weight for text, weight in document if text in ("[A]", "[B]", "[=]")) > 1.0


def test_kinds_come_in_their_shares() -> None:
    assert sum(share for _, share in KINDS.values()) == pytest.approx(1.0)
    rng, seen = random.Random(0), Counter[str]()
    names = {"<|ask|>": "ask", "<|question|>": "reply", "<|grade|>": "grade", "<|judge|>": "judge", "<|referee|>": "referee"}
    for _ in range(4000):
        text = _text(draw_document(rng))
        found = re.match(r"<\|bos\|>(<\|\w+\|>)", text)
        assert found
        seen["sums" if names[found.group(1)] == "grade" and "<|reply|>" not in text else names[found.group(1)]] += 1
    for kind, (_, share) in KINDS.items():
        assert seen[kind] / 4000 == pytest.approx(share, abs=0.03)


def test_every_marker_and_every_number_is_one_token_of_the_shipped_tokenizer() -> None:
    tokenizer = _tokenizer()
    for number, marker in enumerate(MARKERS):
        assert tokenizer.encode(marker, add_special_tokens=False) == [number]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for value in range(LARGEST + 1):
        assert len(tokenizer.encode(f" {value}", add_special_tokens=False)) == 1, value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("grade", "sums")])
def test_segments_are_tokenised_as_the_whole_is(kind: str) -> None:
    """Training encodes segment by segment and the loop encodes whole prompts: they must see the same tokens."""
    tokenizer = _tokenizer()
    for document in _documents(kind, 150):
        pieces = [i for text, _ in document for i in tokenizer.encode(text, add_special_tokens=False)]
        assert pieces == tokenizer.encode(_text(document), add_special_tokens=False), _text(document)


def test_a_graded_reply_is_the_tokens_that_the_loop_samples() -> None:
    """Marks between the sentences aside, its segments (each begins with its own space) are those of the written reply."""
    tokenizer = _tokenizer()
    marks = set(tokenizer.encode("<|right|><|wrong|>", add_special_tokens=False))
    for document in _documents("grade", 300):
        pieces = [i for text, _ in document for i in tokenizer.encode(text, add_special_tokens=False) if text]
        parts = [text for text, _ in document[1:-2] if text and text not in ("<|right|>", "<|wrong|>")]
        whole = tokenizer.encode(f"{document[0][0]}{' '.join(parts)}<|eos|>", add_special_tokens=False)
        assert [i for i in pieces if i not in marks] == whole, parts
        assert pieces[-1] in marks
        assert pieces[-2] == tokenizer.eos_token_id


def test_the_text_is_given_back_as_it_was() -> None:
    tokenizer = _tokenizer()
    for document in _documents("reply", 100):
        reply = document[1][0].removesuffix("<|eos|>")
        ids = tokenizer.encode(reply, add_special_tokens=False)
        assert tokenizer.decode(ids).strip() == reply
