from __future__ import annotations

from dataclasses import replace

from selfeval.records import Pair, Split
from selfeval.stages.added_pairs import CONFIDENCE, attack_pairs, mismatched_pairs

QUESTIONS = {
    "a": ("Tom has 3 red apples and buys 4. How many apples has Tom?", "3 + 4 = 7. The answer is 7."),
    "b": ("Ann has 5 red apples and buys 4. How many apples has Ann?", "5 + 4 = 9. The answer is 9."),
    "c": ("Sue has 2 red apples and buys 5. How many apples has Sue?", "2 + 5 = 7. The answer is 7."),
    "d": ("A train leaves at noon. When does it arrive?", "After 60 minutes. The answer is 1."),
}


def pairs() -> list[Pair]:
    return [
        Pair(key, question, reply, "No idea.", 0.7, (ord(key), 1), (ord(key), 2), Split.TRAIN)
        for key, (question, reply) in QUESTIONS.items()
    ]


def test_the_worse_reply_is_the_good_reply_to_the_most_similar_question_with_another_answer() -> None:
    found = {p.question_id: p for p in mismatched_pairs(pairs(), 1.0, seed=0)}
    assert found.keys() == QUESTIONS.keys()
    # "c" is as similar to "a" as "b" is, but has the same answer.
    assert found["a"].rejected == QUESTIONS["b"][1]
    assert found["a"].rejected_ids == (ord("b"), 1)
    assert found["c"].rejected == QUESTIONS["b"][1]
    for key, pair in found.items():
        assert (pair.prompt, pair.chosen) == QUESTIONS[key]
        assert pair.confidence == CONFIDENCE


def test_the_share_is_a_share_of_the_pairs_and_the_seed_decides() -> None:
    many = [Pair(f"{i}", f"Question {i} of many", f"Reply {i}.", "-", 0.9, (i,), (0,), Split.TRAIN) for i in range(40)]
    found = mismatched_pairs(many, 0.25, seed=1)
    assert len(found) == 10
    assert len({p.question_id for p in found}) == 10
    assert found == mismatched_pairs(many, 0.25, seed=1)
    assert found != mismatched_pairs(many, 0.25, seed=2)
    assert mismatched_pairs(many, 0.0, seed=1) == []


def test_a_question_without_a_suitable_other_has_no_such_pair() -> None:
    one, same = pairs()[0], pairs()[2]
    assert mismatched_pairs([one], 1.0, seed=0) == []
    assert mismatched_pairs([one, same], 1.0, seed=0) == []


def test_another_reply_to_the_same_question_is_no_mismatch() -> None:
    first, other, *_ = pairs()
    second = replace(first, chosen="The answer is 8.", chosen_ids=(8,))
    assert {p.rejected for p in mismatched_pairs([first, second, other], 1.0, seed=0) if p.question_id == "a"} == {other.chosen}


def test_attack_pairs_have_a_worse_reply_of_each_kind_that_needs_no_gold() -> None:
    many = [
        Pair(f"{i}", f"What is {i} plus {i}?", f"The sum is {2 * i}.", "-", 0.7, (i,), (0,), Split.TRAIN) for i in range(200)
    ]
    found = attack_pairs(many, 0.5, seed=1, encode=lambda pair, text: (len(text),))
    assert len(found) == 100
    assert found == attack_pairs(many, 0.5, seed=1, encode=lambda pair, text: (len(text),))
    for pair in found:
        assert pair.chosen == f"The sum is {2 * int(pair.question_id)}."
        assert pair.rejected_ids == (len(pair.rejected),)
        assert pair.confidence == CONFIDENCE
        assert pair.rejected != pair.chosen
    rejected = [pair.rejected for pair in found]
    assert "" in rejected
    assert any(pair.rejected == pair.prompt for pair in found)
    assert any(text.startswith("The sum is ") for text in rejected)
    assert len(set(rejected)) > 20
