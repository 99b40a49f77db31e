from __future__ import annotations

import pytest

from selfeval.quality.dedupe import NearDuplicates, quantities
from selfeval.quality.number_words import with_digits

ENGLISH = {
    "three": "3",
    "twenty one": "21",
    "nineteen ninety": "19 90",
    "two three four": "2 3 4",
    "two and three": "2 3",
    "add twenty and five": "add 20 5",
    "between forty and two": "between 40 2",
    "one hundred and five hundred": "100 500",
    "one hundred and two dozen": "100 24",
    "one hundred and five thousand": "105000",
    "three thousand and five thousand": "3000 5000",
    "five hundred and twenty five and six": "525 6",
    "a hundred and three": "a 103",
    "two hundred thousand": "200000",
    "two million three hundred thousand and five": "2300005",
    "three million two million": "3000000 2000000",
    "six dozen thousand": "72 1000",
    "3.5 million": "3500000",
    "5 two digit numbers": "5 2 digit numbers",
    "two dozen five": "24 5",
    "one hundred one": "101",
    "twenty twenty": "20 20",
    "fifty ten": "50 10",
    "zero": "0",
}
CHINESE = {
    "三": "3",
    "十二": "12",
    "二十一": "21",
    "三百零五": "305",
    "三百五": "350",
    "一万二": "12000",
    "两千": "2000",
    "一亿两千万": "120000000",
    "二〇二四": "2024",
    "3.5万": "35000",
    "一两个": "1 2个",
    "两三百": "200 300",
    "三四十": "30 40",
    "十二三": "12 13",
    "二〇二三": "2023",
    "一二三四": "1234",
}


@pytest.mark.parametrize(("words", "digits"), [*ENGLISH.items(), *CHINESE.items()])
def test_numbers_in_words_become_digits(words: str, digits: str) -> None:
    assert with_digits(words) == digits


@pytest.mark.parametrize("text", ["which one is it", "everyone often weighs tens of hundreds", "一起", "千万别去", "百姓"])
def test_words_that_only_look_like_numbers_are_kept(text: str) -> None:
    assert with_digits(text) == text


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("Tom has three apples.", "Tom has 3 apples.", "Tom has four apples."),
        ("Add twenty-one and 5.", "Add 5 and 21.", "Add twenty-two and 5."),
        ("A thousand pens", "1,000 pens", "A hundred pens"),
        ("汤姆有三个苹果", "汤姆有3个苹果", "汤姆有四个苹果"),
        ("汤姆有十二个苹果", "汤姆有12个苹果", "汤姆有十三个苹果"),
    ],
)
def test_quantities_do_not_depend_on_how_a_number_is_written(one: str, same: str, other: str) -> None:
    assert quantities(one) == quantities(same) != quantities(other)


@pytest.mark.parametrize("words", ["一" + "亿" * 600, "1" * 5000 + "万", "1" * 5000 + " million", "1" * 40 + "万"])
def test_numbers_with_too_many_digits_are_kept(words: str) -> None:
    assert with_digits(words) == words


def test_long_questions_with_other_number_words_are_no_near_duplicates() -> None:
    """Of 28 shingles of 30 words, three differ: an overlap of 25/31 = 0.81 would be a near-duplicate."""
    start, end = " ".join(f"a{chr(97 + i)}" for i in range(14)), " ".join(f"b{chr(97 + i)}" for i in range(15))
    seen = NearDuplicates()
    seen.add("three", f"{start} three {end}")
    assert seen.find(f"{start} four {end}") is None
    assert seen.find(f"{start} three {end}!") == "three"
