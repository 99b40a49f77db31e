"""MinHash: nearly the results of the exact index, with the same rule about numbers."""

from __future__ import annotations

import doctest
import random
import sys

import pytest

from selfeval.errors import MissingPackageError
from selfeval.quality import minhash
from selfeval.quality.dedupe import NearDuplicates
from selfeval.quality.minhash import GrowingDuplicates, SketchedDuplicates, duplicate_index, recall

WORDS = [a + b for a in "bcdfglmnprstv" for b in ("an", "er", "ist", "ol", "uko", "ari", "eta", "imo")]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 15 to 30 words, of which two in three are copies with one or two changed words."""
    rng = random.Random(seed)
    made: list[list[str]] = []
    for n in range(count):
        chosen = list(rng.choice(made)) if n % 3 and made else [rng.choice(WORDS) for _ in range(rng.randint(15, 30))]
        for _ in range(rng.randint(0, 2)):
            chosen[rng.randrange(len(chosen))] = rng.choice(WORDS)
        made.append(chosen)
    return [" ".join(chosen) for chosen in made]


def found_by(index: NearDuplicates | SketchedDuplicates | GrowingDuplicates, texts: list[str]) -> list[set[str]]:
    found = []
    for n, text in enumerate(texts):
        found.append({*index.find_all(text)})
        index.add(str(n), text)
    return found


@pytest.mark.parametrize("unsorted", [7, 4096])
def test_nearly_all_near_duplicates_are_found_and_nothing_else(monkeypatch: pytest.MonkeyPatch, unsorted: int) -> None:
    monkeypatch.setattr(minhash, "_UNSORTED", unsorted)
    texts = make_texts(300)
    exact, sketched = found_by(NearDuplicates(0.7), texts), found_by(SketchedDuplicates(0.7), texts)
    total = sum(map(len, exact))
    assert total > 150
    assert all(few <= many for few, many in zip(sketched, exact, strict=True))
    assert sum(map(len, sketched)) >= 0.98 * total


def test_the_recall_is_that_of_the_formula() -> None:
    """1,000 pairs of one similarity. The count is binomial: 5 standard deviations."""
    letters, hits = "abcdefghijklmnopqrstuvwx", 0
    for trial in range(1000):
        name = "".join(chr(ord("a") + int(digit)) for digit in f"{trial:03}")
        one = [f"{letter}{name}" for letter in letters]
        other = [*one[:17], *(f"{letter}other{name}" for letter in letters[17:])]
        index = SketchedDuplicates(0.5)
        index.add("one", " ".join(one))
        hits += index.find(" ".join(other)) is not None
    # 22 shingles each, of which 15 are shared.
    chance = recall(15 / 29)
    assert 0.7 < chance < 0.8
    assert hits / 1000 == pytest.approx(chance, abs=5 * (chance * (1 - chance) / 1000) ** 0.5)


def test_numbers_are_content() -> None:
    index = SketchedDuplicates(0.5)
    index.add("three", "Tom has 3 red apples in a large basket on the table. How many are left?")
    assert index.find("Tom has 4 red apples in a large basket on the table. How many are left?") is None
    assert index.find("tom has 3 red apples in a large basket on the table! How many are left") == "three"


def test_an_equal_text_comes_before_an_earlier_near_duplicate() -> None:
    first, second = "one two three four five six seven eight nine ten", "one two three four five six seven eight nine"
    for index in (NearDuplicates(0.7), SketchedDuplicates(0.7)):
        index.add("first", first)
        index.add("second", second)
        index.add("again", second)
        assert index.find(second) == "second"
        assert index.find_all(second)[-1] == "second"
        assert "again" not in index.find_all(second)


def test_texts_without_words_and_in_other_scripts() -> None:
    index = SketchedDuplicates(0.7)
    assert index.find("...") is None
    index.add("empty", "...")
    assert index.find("?!") == "empty"
    chinese = "\u5c0f\u660e\u6709\u4e09\u4e2a\u82f9\u679c\u548c\u4e24\u4e2a\u68a8\u5b50\u5728\u684c\u5b50\u4e0a"
    index.add("zh", chinese)
    assert index.find(f"{chinese}\u3002") == "zh"
    index.add("half", "a lone \ud800 surrogate in a text")
    assert index.find("a lone \ud800 surrogate in a text") == "half"


@pytest.mark.parametrize("above", [0, 1, 100, 10_000])
def test_the_index_changes_at_a_number_of_texts(above: int) -> None:
    texts = make_texts(300, seed=1)
    growing, exact = GrowingDuplicates(0.7, above), found_by(NearDuplicates(0.7), texts)
    found = found_by(growing, texts)
    assert found[: above + 1] == exact[: above + 1]
    assert sum(map(len, found)) >= 0.99 * sum(map(len, exact))
    assert (growing._exact is None) == (above < 300)


def test_the_exact_index_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert isinstance(duplicate_index(0.7, None), NearDuplicates)
    with pytest.raises(MissingPackageError, match=r"needs the package datasketch; .*self-evaluator\[data\]"):
        duplicate_index(0.7, 100_000)


def test_the_examples_of_the_documentation() -> None:
    found = doctest.testmod(minhash)
    assert (found.failed, found.attempted > 0) == (0, True)
