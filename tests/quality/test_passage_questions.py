from __future__ import annotations

import pytest

from selfeval.quality.passage_questions import first_question, passage_reason, says_unanswered, share_in, support


@pytest.mark.parametrize(
    "question",
    [
        "According to the text, how much is a bike?",
        "What is the price in the passage?",
        "Based on the given document, who may rent a bike?",
        "What is the main idea of this article?",
        "What does the author say about locks?",
        "What is the author\u2019s opinion of helmets?",
        "Which places does it cost to visit, as the author mentions?",
        "Which fees are mentioned above?",
        "What are the fees listed here?",
        "What can be learned from the following information?",
        "根据以上内容，押金是多少？",
        "文中提到的押金是多少？",
        "作者认为押金太高吗？",
        "这段话主要讲了什么？",
        "资料中的费用是多少？",
        "根据资料，几点开门？",
    ],
)
def test_a_question_that_needs_the_passage_in_view_is_dropped(question: str) -> None:
    assert passage_reason(question) == "refers_to_passage"


@pytest.mark.parametrize(
    "question",
    [
        "How much is a bike per day?",
        "Where do I find the identity document that I left on a bike?",
        "Can I pay by text message?",
        "Where is the information about my rides?",
        "How do I get from the above-ground station to the depot?",
        "押金什么时候退还？",
        "租车需要准备什么材料？",
        "¿Cuánto cuesta una bicicleta?",
        "Who is the author of the handbook?",
        "When does the author of the handbook hold office hours?",
        "How much does the mountain passage cost?",
        "How long is a passage to the island?",
        "这本书的作者是谁？",
    ],
)
def test_other_questions_are_kept(question: str) -> None:
    assert passage_reason(question) is None


def test_a_text_without_a_question_mark_is_not_a_question() -> None:
    assert passage_reason("A bike costs 3 euros per hour.") == "no_question_mark"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Not in the passage.", True),
        ("The passage doesn\u2019t mention a deposit.", True),
        ("There is no information about it.", True),
        ("No information.", True),
        ("There is no mention of a deposit.", True),
        ("No information is given.", True),
        ("There is no information desk open after 18:00.", False),
        ("Ring twice if there is no answer.", False),
        ("资料中没有", True),
        ("文中没有提到押金。", True),
        ("The deposit is not given back.", False),
        ("Electric bikes are not available at night.", False),
        ("没有押金。", False),
    ],
)
def test_a_reply_that_says_that_the_answer_is_missing(reply: str, expected: bool) -> None:
    assert says_unanswered(reply) is expected


PASSAGE = "Prices > Cargo bikes\n\nA cargo bike costs 4 euros per hour, with a minimum of 2 hours."
QUESTION = "What does a cargo bike cost?"


def test_the_support_is_the_share_of_the_added_words_that_are_in_the_passage() -> None:
    # Added: 4, euros, hour (of at least four letters, and not cargo or bike): all in the passage.
    assert support("A cargo bike costs 4 euros per hour.", PASSAGE, "How expensive is a cargo bike?") == 1.0
    # Added: euros and minute, because "costs" is the "cost" of the question; one of two is there.
    assert support("It costs euros per minute.", PASSAGE, QUESTION) == 0.5


def test_a_wrong_number_is_no_support_however_many_words_agree() -> None:
    assert support("A cargo bike costs 5 euros per hour, with a minimum of 2 hours.", PASSAGE, QUESTION) == 0.0


def test_a_reply_that_adds_nothing_cannot_be_checked() -> None:
    assert support("Yes.", PASSAGE, QUESTION) == support("", PASSAGE, QUESTION) == 0.0
    assert support("A cargo bike.", PASSAGE, QUESTION) == 0.0


def test_chinese_is_compared_by_pairs_of_characters() -> None:
    passage = "押金是二十元，三天内退还。"
    assert support("三天内退还。", passage, "押金多久退？") == 1.0
    # Added: 七天, 天后; neither is there (the pair 后退 is not, 退还 is): one of four pairs.
    assert support("七天后退还", passage, "押金多久退？") == pytest.approx(1 / 4)


def test_the_share_of_the_question_that_is_in_the_passage() -> None:
    # cargo and bike of (what, does, cargo, bike, cost), and cost, which is there as "costs".
    assert share_in(QUESTION, PASSAGE) == pytest.approx(3 / 5)
    assert share_in("What is the answer?", PASSAGE) == share_in("?", PASSAGE) == 0.0


def test_only_the_question_is_kept_of_a_text_that_begins_with_one() -> None:
    assert first_question("How much is it?\nIt is free.") == "How much is it?"
    assert first_question('"How much is it?"\n\nA: It is free.') == "How much is it?"
    assert first_question("押金多少？\n\n二十元。") == "押金多少？"
    assert first_question("I have a bike.\nHow much is it?") == "I have a bike.\nHow much is it?"
