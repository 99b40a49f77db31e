from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from selfeval.backbone.vocabulary.merges import LEAST_SAVED, learn_merges

Word = tuple[int, ...]
SYMBOLS = st.integers(-2, 4)
WORDS = st.dictionaries(st.lists(SYMBOLS, max_size=9).map(tuple), st.integers(1, 4), max_size=10)


def counted_anew(
    words: dict[Word, int], count: int, first: int, closed: int, saved_by: dict[int, int]
) -> list[tuple[Word, int]]:
    """The definition: count all pairs in every step, and join from left to right."""
    texts, found = [(list(word), number) for word, number in words.items()], []
    for new in range(first, first + count):
        saved: Counter[Word] = Counter()
        for text, number in texts:
            for pair in pairwise(text):
                if min(pair) >= 0 and closed not in pair:
                    saved[pair] += number
            for symbol in text:
                saved[(symbol,)] += number * saved_by.get(symbol, 0)
        best = min(saved, key=lambda symbols: (-saved[symbols], len(symbols), symbols), default=None)
        if best is None or saved[best] < LEAST_SAVED:
            break
        found.append((best, saved[best]))
        for text, _ in texts:
            join(text, best, new)
    return found


def join(text: list[int], symbols: Word, new: int) -> None:
    place = 0
    while place < len(text):
        if tuple(text[place : place + len(symbols)]) == symbols:
            text[place : place + len(symbols)] = [new]
        place += 1


@given(words=WORDS, closed=st.integers(0, 4))
def test_counting_along_the_way_equals_counting_anew(words: dict[Word, int], closed: int) -> None:
    # Equal savings of two characters would be decided by another order of their negative numbers.
    saved_by = {-1: 2, -2: 1}
    found = learn_merges(words, 12, 10, closed=[closed], saved_by=saved_by)
    expected = counted_anew(words, 12, 10, closed, saved_by)
    assert [(each.symbols, each.saved) for each in found] == expected


def test_overlapping_pairs_are_joined_from_the_left() -> None:
    # a a a a a: two pairs (10 10 a), then the pair of pairs (11 a), each in two texts.
    found = learn_merges({(1,) * 5: 2}, 9, 10)
    assert [each.symbols for each in found] == [(1, 1), (10, 1), (10, 11)]
    assert [each.saved for each in found] == [8, 2, 2]


def test_a_rejected_pair_is_never_joined_and_the_ids_have_no_gap() -> None:
    found = learn_merges({(1, 2, 3): 5, (3, 4): 2}, 9, 10, accept=lambda symbols: symbols != (1, 2))
    assert [each.symbols for each in found] == [(2, 3), (1, 10), (3, 4)]


def test_nothing_is_learnt_from_nothing() -> None:
    assert learn_merges({}, 3, 10) == []
    assert learn_merges({(): 2, (1,): 9}, 3, 10) == []
    assert learn_merges({(1, 2): 9}, 0, 10) == []


def test_the_time_grows_linearly_with_the_number_of_characters() -> None:
    def seconds(characters: int) -> float:
        words = {(-1 - character,): 1 for character in range(characters)}
        saved_by = {symbol: 1 for (symbol,) in words}
        start = time.process_time()
        assert learn_merges(words, 5, 10, saved_by=saved_by) == []
        return time.process_time() - start

    # Four times as many characters take about 4 times as long; a search of the text for each character took 16 times.
    assert min(seconds(80_000) for _ in range(3)) < 9 * min(seconds(20_000) for _ in range(3))
