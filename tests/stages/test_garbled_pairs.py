"""Garbled texts and other styles as training pairs."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

from selfeval.evaluation.attacks import Target, attacks_on
from selfeval.records import Pair, Split
from selfeval.stages.garbled_pairs import GARBLED, GARBLED_CONFIDENCE, STYLES, garbled_pairs


def pairs(count: int) -> list[Pair]:
    return [
        Pair(
            *(f"q{i}", f"Tom has {i} red apples and buys {i} more. How many has Tom?"),
            *(f"{i} + {i} = {2 * i}. The answer is {2 * i}.", f"{i} + {i} = {3 * i}. The answer is {3 * i}."),
            *(0.9, (i, 1), (i, 2), Split.TRAIN),
        )
        for i in range(1, count + 1)
    ]


def encode(pair: Pair, text: str) -> tuple[int, ...]:
    return (len(text), 7)


def test_both_replies_are_better_than_a_garbled_text_and_styles_keep_the_preference() -> None:
    many = pairs(400)
    found = garbled_pairs(many, 0.5, seed=1, encode=encode)
    assert len(found) == 200
    assert found == garbled_pairs(many, 0.5, seed=1, encode=encode)
    assert found != garbled_pairs(many, 0.5, seed=2, encode=encode)
    sources = {pair.question_id: pair for pair in many}
    garbled = [pair for pair in found if pair.confidence == GARBLED_CONFIDENCE]
    assert 80 < len(garbled) < 120
    over_rejected = 0
    for pair in garbled:
        source = sources[pair.question_id]
        assert (pair.chosen, pair.chosen_ids) in ((source.chosen, source.chosen_ids), (source.rejected, source.rejected_ids))
        over_rejected += pair.chosen == source.rejected
        assert pair.rejected not in (source.chosen, source.rejected)
        assert pair.rejected_ids == (len(pair.rejected), 7)
    assert 0.35 < over_rejected / len(garbled) < 0.65
    changed = Counter[tuple[bool, bool]]()
    for pair in found:
        source = sources[pair.question_id]
        if pair.confidence != GARBLED_CONFIDENCE:
            n, kinds = int(pair.question_id[1:]), (pair.chosen != source.chosen, pair.rejected != source.rejected)
            changed[kinds] += 1
            assert pair.confidence == 0.9
            assert pair.chosen_ids == ((len(pair.chosen), 7) if kinds[0] else source.chosen_ids)
            assert pair.rejected_ids == ((len(pair.rejected), 7) if kinds[1] else source.rejected_ids)
            assert re.findall(r"\d+", pair.chosen) == [f"{n}", f"{n}", f"{2 * n}", f"{2 * n}"]
            assert re.findall(r"\d+", pair.rejected) == [f"{n}", f"{n}", f"{3 * n}", f"{3 * n}"]
    # Style does not show which reply is better.
    assert set(changed) == {(True, False), (False, True), (True, True)}
    assert min(changed.values()) > 20


def test_no_text_is_one_of_the_attacks() -> None:
    many = pairs(300)
    texts = {pair.rejected for pair in garbled_pairs(many, 1.0, seed=0, encode=encode)}
    attacks = {
        attack.worse
        for pair in many
        for seed in range(3)
        for attack in attacks_on(Target(pair.question_id, pair.prompt, pair.chosen, ()), seed=seed, verdict="Verdict: A")
    }
    assert len(texts) > 200
    assert not texts & attacks


def test_replies_without_spaces_are_taken_apart_by_character() -> None:
    question, chosen, rejected = "\u4e00\u52a0\u4e00\uff1f", "\u7b54\u6848\u662f\u4e8c\u3002", "\u7b54\u6848\u662f\u4e09\u3002"
    chinese = [Pair(f"q{i}", question, chosen, rejected, 0.9, (1,), (2,), Split.TRAIN) for i in range(100)]
    found = garbled_pairs(chinese, 1.0, seed=0, encode=encode)
    made = {pair.rejected for pair in found if pair.confidence == GARBLED_CONFIDENCE}
    assert any(sorted(text) == sorted(chosen) for text in made)
    # A style that leaves a reply as it is, and a shuffle that does, are left out.
    assert all(pair.chosen != pair.rejected for pair in found)


def test_chinese_texts_are_no_longer_than_replies_and_every_style_changes_the_reply() -> None:
    def reply(n: int) -> str:
        return f"小明有{n}个苹果，又买了{n}个苹果。所以他一共有{2 * n}个苹果。" * 2

    many = [Pair(f"q{n}", reply(n), reply(n), reply(3 * n), 0.9, (1,), (2,), Split.TRAIN) for n in range(1, 301)]
    found = garbled_pairs(many, 1.0, 0, lambda pair, text: tuple(map(ord, text)), limit=40)
    garbled = [pair for pair in found if pair.confidence == GARBLED_CONFIDENCE]
    # At most 48 pieces, or ten times six; letters in groups of nine are the longest.
    assert max(len(pair.rejected) for pair in garbled) < 10 * 48
    assert max(len(pair.rejected_ids) for pair in garbled) == 40
    restyled = [pair for pair in found if pair.confidence != GARBLED_CONFIDENCE]
    assert len(restyled) > 100
    for pair in restyled:
        n = int(pair.question_id[1:])
        assert (pair.chosen, pair.rejected) != (reply(n), reply(3 * n))
    assert any("\n" in pair.chosen for pair in restyled)
    assert any("。" not in pair.chosen for pair in restyled)


def test_code_and_formulas_keep_their_capitals() -> None:
    rng = random.Random(0)
    for text in ("use `len(x)`", "it is $\\frac{1}{2}$", "NaCl and water", "Co2 is formed"):
        assert STYLES["in_capitals"](text, rng) == text
    assert STYLES["in_capitals"]("It is 5.", rng) == "IT IS 5."


def test_a_pair_without_text_has_no_garbled_text_equal_to_it() -> None:
    empty = [Pair("q", "Question?", "", "", 0.9, (1,), (2,), Split.TRAIN)] * 60
    assert all(pair.rejected.strip() != pair.chosen.strip() for pair in garbled_pairs(empty, 1.0, seed=0, encode=encode))
    assert set(GARBLED).isdisjoint(STYLES)


def test_no_garbled_text_of_a_short_reply_is_the_other_one() -> None:
    short = [replace(pair, chosen="21", rejected="12") for pair in pairs(400)]
    found = garbled_pairs(short, 1.0, seed=0, encode=encode)
    assert not [pair for pair in found if pair.confidence == GARBLED_CONFIDENCE and pair.rejected in ("21", "12")]


def test_numbers_and_code_keep_their_signs_without_punctuation() -> None:
    assert STYLES["unpunctuated"]("答案是3、5。时间12：30，好。", random.Random(0)) == "答案是3、5时间12：30好"
    code = "def f(x):\n    return x_1;\n"
    assert STYLES["unpunctuated"](code, random.Random(0)) == code
