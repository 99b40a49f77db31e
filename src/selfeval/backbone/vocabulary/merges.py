"""Byte-pair encoding continued from the tokens of an existing tokenizer (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909).

In each step the most frequent pair of neighbouring tokens within a word becomes a token. The counts are incremental: a merge
visits the places of its pair only, so the time grows with the text and hardly with the number of merges.

A symbol is the id of a token, or a negative number for a character without a token, which the tokenizer writes as bytes. Such
a character can become a token as well, and then takes part in pairs.

Shapes: S symbols of all words, P places of a pair.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_SAVED", "Learnt", "learn_merges"]

Ints = NDArray[np.int64]

LEAST_SAVED = 2
"""Tokens that a new token must save in the text; a pair that occurs once teaches nothing."""

_GONE = np.iinfo(np.int64).min
"""Symbol of a place whose token became the right part of another one."""


@dataclass(frozen=True)
class Learnt:
    """A new token.

    Attributes:
        symbols: the two ids that it joins, or the negative symbol of a character.
        saved: number of tokens that it saves in the text, given the earlier ones.
    """

    symbols: tuple[int, ...]
    saved: int


def learn_merges(
    words: Mapping[tuple[int, ...], int],
    count: int,
    first: int,
    *,
    closed: Sequence[int] = (),
    saved_by: Mapping[int, int] | None = None,
    accept: Callable[[tuple[int, ...]], bool] = lambda symbols: True,
) -> list[Learnt]:
    """Learn new tokens, the one that saves most first; of equal ones, characters first, then the pair with the smaller ids.

    Args:
        words: occurrences of each word, by its symbols. No token crosses the end of a word.
        count: maximum number of new tokens.
        first: id of the first new token, above all ids in `words`; the others follow.
        closed: ids that no pair may contain, such as that of unknown letters. Default: none.
        saved_by: the tokens that an occurrence of each negative symbol saves as a token. Default: none.
        accept: called with the symbols of the next token; False rejects it for good. Default: accepts all.

    Returns:
        The new tokens, fewer than `count` if no further one saves `LEAST_SAVED` tokens.

    Example:
        >>> [each.symbols for each in learn_merges({(1, 2, 1, 2): 3, (1, 3): 2}, 9, first=10)]
        [(1, 2), (10, 10), (1, 3)]
    """
    if not words or count <= 0:
        return []
    corpus = _Corpus(words, first + count, closed, saved_by or {})
    heap = [(-saved, code) for code, saved in corpus.saved.items()]
    heapq.heapify(heap)
    found: list[Learnt] = []
    while heap and len(found) < count:
        saved, code = -heap[0][0], heap[0][1]
        now = corpus.saved[code]
        if now < LEAST_SAVED:
            heapq.heappop(heap)
        elif now < saved:
            # Counts of a pair only decrease after it was pushed, so an entry is corrected when it reaches the top.
            heapq.heapreplace(heap, (-now, code))
        else:
            heapq.heappop(heap)
            symbols = corpus.symbols(code)
            if accept(symbols):
                new = corpus.replace(code, first + len(found))
                found.append(Learnt(symbols, saved))
                for pair in new:
                    heapq.heappush(heap, (-corpus.saved[pair], pair))
    return found


class _Corpus:
    """The words as one linked list of symbols, with the places of every pair.

    A place is the index of the left symbol of a pair. The code of a pair (a, b) is a * size + b, that of a character its
    negative symbol.

    Attributes:
        saved: tokens that each candidate would save now, by its code.
    """

    def __init__(
        self, words: Mapping[tuple[int, ...], int], size: int, closed: Sequence[int], saved_by: Mapping[int, int]
    ) -> None:
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        total = int(lengths.sum())
        self._symbols_S: Ints = np.fromiter((symbol for word in words for symbol in word), np.int64, total)
        self._weights_S: Ints = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths)
        ends_S = lengths.cumsum()
        self._next_S: Ints = np.arange(1, total + 1)
        self._next_S[ends_S[lengths > 0] - 1] = -1
        self._previous_S: Ints = np.arange(-1, total - 1)
        self._previous_S[(ends_S - lengths)[lengths > 0]] = -1
        self._size, self._is_open = size, np.ones(size, dtype=np.bool_)
        self._is_open[list(closed)] = False
        self.saved: dict[int, int] = {}
        self._places: dict[int, Ints] = {}
        self._add(np.arange(total))
        self._add_characters(saved_by)

    def symbols(self, code: int) -> tuple[int, ...]:
        return (code,) if code < 0 else divmod(code, self._size)

    def replace(self, code: int, new: int) -> list[int]:
        """Write a new token at all places of a candidate, and return the codes of the pairs that contain it."""
        places_P = self._places_of(code)
        del self.saved[code]
        if code >= 0:
            self._join(places_P, new)
        else:
            self._symbols_S[places_P] = new
        return self._add(_united(places_P, self._previous_S[places_P]))

    def _places_of(self, code: int) -> Ints:
        """Return the places of a candidate, from left to right, without those that overlap one on their left."""
        places_P: Ints = self._places.pop(code)
        if code < 0:
            return places_P
        left, right = divmod(code, self._size)
        # Some are stale: a later merge has taken one of the two symbols.
        next_P = self._next_S[places_P]
        places_P = places_P[(self._symbols_S[places_P] == left) & (next_P >= 0) & (self._symbols_S[next_P] == right)]
        return places_P if left != right else places_P[_is_even_in_run(places_P, self._next_S[places_P])]

    def _join(self, places_P: Ints, new: int) -> None:
        right_P = self._next_S[places_P]
        # Pairs with a neighbour disappear too; a neighbour may itself be such a pair, and counts once.
        self._subtract(_united(places_P, self._previous_S[places_P], right_P))
        after_P = self._next_S[right_P]
        self._symbols_S[places_P], self._symbols_S[right_P] = new, _GONE
        self._next_S[places_P] = after_P
        inside_P = after_P >= 0
        self._previous_S[after_P[inside_P]] = places_P[inside_P]

    def _subtract(self, places_P: Ints) -> None:
        codes_P, places_P = self._pairs_at(places_P)
        codes, inverse_P = np.unique(codes_P, return_inverse=True)
        lost = np.zeros(len(codes), dtype=np.int64)
        np.add.at(lost, inverse_P, self._weights_S[places_P])
        for code, weight in zip(codes.tolist(), lost.tolist(), strict=True):
            if code in self.saved:
                self.saved[code] -= weight

    def _add_characters(self, saved_by: Mapping[int, int]) -> None:
        # One sort for all: a search per character takes the product of the characters and the symbols of the text.
        places_P = np.flatnonzero(self._symbols_S < 0)
        for symbol, weight, places in self._by_code(self._symbols_S[places_P], places_P):
            if symbol in saved_by:
                self.saved[symbol], self._places[symbol] = saved_by[symbol] * weight, places

    def _by_code(self, codes_P: Ints, places_P: Ints, least: int = 0) -> Iterator[tuple[int, int, Ints]]:
        """Yield the codes, ascending, with their weights of at least `least` and their places from left to right."""
        if not len(codes_P):
            return
        order_P = np.argsort(codes_P, kind="stable")
        codes_P, places_P = codes_P[order_P], places_P[order_P]
        starts = np.flatnonzero(np.concatenate(([True], codes_P[1:] != codes_P[:-1])))
        stops = np.append(starts[1:], len(codes_P))
        weights = np.add.reduceat(self._weights_S[places_P], starts)
        kept = weights >= least
        columns = (codes_P[starts[kept]], weights[kept], starts[kept], stops[kept])
        for code, weight, start, stop in zip(*(column.tolist() for column in columns), strict=True):
            yield code, weight, places_P[start:stop]

    def _add(self, places_P: Ints) -> list[int]:
        """Count the pairs at these places, and return their codes."""
        # A pair is counted once, when its younger token is made, and can only become rarer: a rare one never becomes a token.
        codes = []
        for code, weight, places in self._by_code(*self._pairs_at(places_P), LEAST_SAVED):
            self.saved[code], self._places[code] = weight, places
            codes.append(code)
        return codes

    def _pairs_at(self, places_P: Ints) -> tuple[Ints, Ints]:
        """Return the codes of the pairs that begin at these places, and the places that begin one."""
        places_P = places_P[self._next_S[places_P] >= 0]
        left_P, right_P = self._symbols_S[places_P], self._symbols_S[self._next_S[places_P]]
        can_join_P = self._can_join(left_P) & self._can_join(right_P)
        return (left_P * self._size + right_P)[can_join_P], places_P[can_join_P]

    def _can_join(self, symbols_P: Ints) -> NDArray[np.bool_]:
        # A negative index would read from the end of the table, so it is replaced before.
        found: NDArray[np.bool_] = (symbols_P >= 0) & self._is_open[np.maximum(symbols_P, 0)]
        return found


def _united(*places: Ints) -> Ints:
    found = np.unique(np.concatenate(places))
    return found[found >= 0]


def _is_even_in_run(places_P: Ints, next_P: Ints) -> NDArray[np.bool_]:
    """Return which places are the first, third, ... of a run of overlapping ones: in "aaa" only the first pair is joined."""
    count = len(places_P)
    begins_P = np.ones(count, dtype=np.bool_)
    begins_P[1:] = places_P[1:] != next_P[:-1]
    start_P = np.maximum.accumulate(np.where(begins_P, np.arange(count), 0))
    found: NDArray[np.bool_] = (np.arange(count) - start_P) % 2 == 0
    return found
