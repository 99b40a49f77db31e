from __future__ import annotations

import random

import pytest

from selfeval.quality.dedupe import NearDuplicates, comparable, jaccard, normalise, shingles, units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Tom has\n3   apples!! ", "tom has 3 apples"),
        ("STRASSE straße", "strasse strasse"),
        ("Ｔｏｍ　ｈａｓ　３", "tom has 3"),  # full-width forms
        ("don't / don’t", "don t don t"),
        ("3.5 kg, 12:30. End.", "3.5 kg 12:30 end"),
        ("1,000 or 1000 or 1,5", "1000 or 1000 or 1,5"),
        ("8-3, 8 - 3, 8*3, 8/3, 8 × 3, 8 − 3", "8 − 3 8 − 3 8 × 3 8 ÷ 3 8 × 3 8 − 3"),
        ("at -5 degrees; x - y; (2+3)*4", "at − 5 degrees x − y 2 + 3 × 4"),
        ("well-known e-mail, 20% of $5, x^2", "well known e mail 20 % of $ 5 x ^ 2"),
        ("हिन्दी में", "हिन्दी में"),  # vowel signs are marks, not punctuation
        ("小明有3个苹果，吃了1个。", "小明有3个苹果 吃了1个"),
        ("so\u00adft zero\u200bwidth", "soft zerowidth"),
        ("?!…", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_units_are_words_or_characters_by_script() -> None:
    assert units("Tom has 3.") == ["tom", "has", "3"]
    assert units("안녕 세상") == ["안녕", "세상"]  # Korean has spaces
    assert units("有 3 个") == ["有", "3", "个"]
    assert units("ไป ไหน") == list("ไปไหน")
    assert units("") == []


def test_shingles_and_jaccard() -> None:
    assert shingles("a b c d") == {"a b c", "b c d"}
    assert shingles("a b c d", size=2) == {"a b", "b c", "c d"}
    assert shingles("a b") == {"a b"}
    assert shingles("...") == frozenset()
    assert shingles("我爱你们") == {"我 爱 你", "爱 你 们"}
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset(), frozenset()) == 1.0
    assert jaccard(frozenset("a"), frozenset()) == 0.0
    with pytest.raises(ValueError, match="size"):
        shingles("a b", size=0)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("What's the capital of France?", "What is the capital of France?"),
        ("Question: What’s the capital of France?", "what is the capital of france"),
        ("Q 7: Why can't the bird fly?", "Why cannot the bird fly?"),
        ("They don't know how it's done, and we're late.", "They do not know how it is done and we are late"),
        ("Sure! Here's a new question:\n\nLet's see: who'll win?", "Let us see: who will win?"),
        ("I'm told you've won't power.", "I am told you have will not power"),
    ],
)
def test_labels_and_contractions_make_no_difference(text: str, same: str) -> None:
    assert comparable(text) == comparable(same)
    seen = NearDuplicates()
    seen.add("q1", text)
    assert seen.find(same) == "q1"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tom's apples are red.", "Tom is apples are red."),  # a genitive
        ("Tom has 3 apples.", "Question 3: Tom has apples."),  # the number of a label is not content
        ("Does he do it?", "Doesn't he do it?"),
    ],
)
def test_comparable_keeps_what_differs(one: str, other: str) -> None:
    assert comparable(one) != comparable(other)


LONG = "Tom goes to the market on Monday morning and buys {} apples and {} pears for his old mother who likes fruit{}"


def test_numbers_are_content_and_wording_is_not() -> None:
    seen = NearDuplicates()
    seen.add("q1", LONG.format(3, 5, "."))
    assert seen.find(LONG.format(3, 5, "!").upper()) == "q1"  # equal after normalisation
    assert seen.find(LONG.format(3, 5, " a lot")) == "q1"  # 19 of 21 shingles: 0.90
    assert seen.find(LONG.format(4, 5, ".")) is None
    assert seen.find(LONG.format(4, 5, " a lot")) is None
    assert seen.find(LONG.format(3, 5, ", and 5 plums")) is None  # another 5: another multiset
    assert seen.find("What is the capital of France?") is None


def test_numbers_may_count_as_words() -> None:
    """Of 28 shingles of 30 words, the three with the number differ: an overlap of 25/31 = 0.81."""
    words = [f"word{chr(97 + n)}" for n in range(26)] + ["and", "so", "on"]
    old, new = (" ".join([*words[:15], number, *words[15:]]) for number in ("18", "20"))
    for same_numbers, expected in ((True, None), (False, "old")):
        index = NearDuplicates(0.8, same_numbers=same_numbers)
        index.add("old", old)
        assert index.find(new) == expected
    stricter = NearDuplicates(0.82, same_numbers=False)
    stricter.add("old", old)
    assert stricter.find(new) is None


def test_operators_are_content() -> None:
    seen = NearDuplicates(threshold=0.3)
    seen.add("minus", "Please compute the value of 30 - 5 and explain each step of your work to a child")
    assert seen.find("Please compute the value of 30 * 5 and explain each step of your work to a child") is None
    assert seen.find("Please compute the value of 30-5 and explain each step of your work to a child") == "minus"


def test_the_threshold_is_reached_at_equality() -> None:
    # a..g has 5 shingles, a..f 4 of them: 4/5.
    seen, strict = NearDuplicates(threshold=0.8), NearDuplicates(threshold=0.81)
    for index in (seen, strict):
        index.add("k", "a b c d e f g")
    assert seen.find("a b c d e f") == "k"
    assert strict.find("a b c d e f") is None
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            NearDuplicates(threshold=threshold)


def test_chinese_texts() -> None:
    seen = NearDuplicates(threshold=0.7)
    seen.add("z1", "小明有3个苹果，吃了1个，还剩几个苹果？")
    assert seen.find("小明有3个苹果，吃了1个，还剩几个苹果呢？") == "z1"
    assert seen.find("小明有4个苹果，吃了1个，还剩几个苹果呢？") is None
    assert seen.find("小红有3支铅笔，丢了1支，现在有多少支？") is None


def test_the_first_of_equal_texts_keeps_its_key_and_an_equal_text_comes_before_a_near_one() -> None:
    seen = NearDuplicates(threshold=0.5)
    seen.add("first", "a b c d e f g")
    seen.add("second", "A, b, c, d, e, f, g.")
    seen.add("third", "a b c d e f")
    assert seen.find("a b c d e f g") == "first"
    assert seen.find("a b c d e f") == "third"
    assert seen.find("a b c d e f g h") == "first"
    assert NearDuplicates().find("") is None


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choice("abc1") for _ in range(rng.randint(0, 9))) for _ in range(400)]
    for threshold in (0.3, 0.7, 0.8, 1.0):
        seen, earlier, found = NearDuplicates(threshold), list[str](), 0
        for i, text in enumerate(texts):
            near = [
                other
                for other in earlier
                if sorted(t for t in other.split() if t == "1") == sorted(t for t in text.split() if t == "1")
                and jaccard(shingles(other), shingles(text)) >= threshold
            ]
            key = seen.find(text)
            assert (key is not None) == bool(near or text in earlier)
            assert key is None or texts[int(key)] in [*near, text]
            found += key is not None
            seen.add(str(i), text)
            earlier.append(text)
        assert 0 < found < len(texts)
