"""Counts of n-grams in a collection of texts, from which distinct-n and self-BLEU of any part of it are computed.

Shapes: N texts, E entries (an n-gram of a text, with its count).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.dedupe import units
from selfeval.quality.jackknife import Kept

__all__ = ["BLEU_ORDERS", "NgramCounts", "TextCounts", "count_ngrams", "distinct_share", "self_bleu"]

Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]

BLEU_ORDERS = 4


@dataclass(frozen=True)
class NgramCounts:
    """Entries of one order, sorted by n-gram and, within an n-gram, by falling count.

    Attributes:
        text_E: index of the text.
        ngram_E: number of the n-gram.
        count_E: how often the text has it.
    """

    text_E: Numbers
    ngram_E: Numbers
    count_E: Numbers


@dataclass(frozen=True)
class TextCounts:
    """N-grams of a collection of N texts.

    Attributes:
        lengths_N: number of units per text.
        orders: counts of unigrams, bigrams and so on.
    """

    lengths_N: Numbers
    orders: tuple[NgramCounts, ...]


def count_ngrams(texts: Sequence[str], *, orders: int = BLEU_ORDERS) -> TextCounts:
    """Count the n-grams of each text.

    Args:
        texts: N texts; case and punctuation are folded, and scripts without spaces are split into characters.
        orders: largest n.
    """
    numbers: dict[str, int] = {}
    flat, lengths = array("q"), array("q")
    # The units of a text are numbered at once: lists of words of a whole file would take several times its size.
    for text in texts:
        parts = units(text)
        lengths.append(len(parts))
        flat.extend([numbers.setdefault(part, len(numbers)) for part in parts])
    lengths_N, units_P = np.array(lengths, dtype=np.int64), np.array(flat, dtype=np.int64)
    return TextCounts(lengths_N, tuple(_orders(units_P, lengths_N, max(1, len(numbers)), orders)))


def _orders(units_P: Numbers, lengths_N: Numbers, vocabulary: int, orders: int) -> Iterator[NgramCounts]:
    """Yield the counts of each order: an n-gram is named by the number of its first n - 1 units and the last one."""
    text_P = np.repeat(np.arange(len(lengths_N)), lengths_N)
    left_P = np.repeat(np.cumsum(lengths_N), lengths_N) - np.arange(len(units_P))  # units from here to the end of the text
    starts, ngrams = np.arange(len(units_P)), np.zeros(len(units_P), dtype=np.int64)
    for n in range(1, orders + 1):
        has_n = left_P[starts] >= n
        starts, ngrams = starts[has_n], ngrams[has_n]
        ngrams = np.unique(ngrams * vocabulary + units_P[starts + n - 1], return_inverse=True)[1]
        yield _counts(ngrams, text_P[starts], len(lengths_N))


def _counts(ngrams: Numbers, places: Numbers, n: int) -> NgramCounts:
    """Count each n-gram by text, given the n-gram and the text of every occurrence."""
    keys, counts = np.unique(ngrams * n + places, return_counts=True)
    ngram_E, text_E = np.divmod(keys, max(1, n))
    order = np.lexsort((text_E, -counts, ngram_E))
    return NgramCounts(text_E=text_E[order], ngram_E=ngram_E[order], count_E=counts[order])


def distinct_share(counts: TextCounts, n: int, kept: Kept) -> float:
    """Compute distinct-n of the kept texts: distinct n-grams over all n-grams; NaN if there are none.

    Args:
        counts: n-grams of the collection, up to at least n.
        n: number of units per n-gram, >= 1.
        kept: `[N]`, True for the texts that are used.
    """
    order = counts.orders[n - 1]
    kept_E = kept[order.text_E]
    total = int(order.count_E[kept_E].sum())
    return _first_of_each(order.ngram_E[kept_E]).sum() / total if total else float("nan")


def self_bleu(counts: TextCounts, kept: Kept) -> float:
    """Compute self-BLEU: the mean BLEU-4 of each kept text, with all other kept texts as its references.

    BLEU is that of sentences as sacrebleu computes it: only orders that the text has, exponential smoothing of orders without a
    match, and the brevity penalty of the reference with the closest length. Zhu et al. 2018 (https://arxiv.org/abs/1802.01886).
    Comparing N texts with each other takes O(N), because a text needs only the largest count of each n-gram in the others.

    Args:
        counts: n-grams of the collection, up to order 4.
        kept: `[N]`, True for the texts that are used.

    Returns:
        The mean in [0, 1]; 1 if all texts are equal. NaN with fewer than two texts.
    """
    if kept.sum() < 2:
        return float("nan")
    log_N, used_N, halvings_N = np.zeros(len(kept)), np.zeros(len(kept)), np.zeros(len(kept))
    for n, order in enumerate(counts.orders[:BLEU_ORDERS], start=1):
        total_N = np.maximum(counts.lengths_N - n + 1, 0)
        matched_N = _matches(order, kept)
        has_order_N, is_unmatched_N = total_N > 0, (total_N > 0) & (matched_N == 0)
        halvings_N += is_unmatched_N
        numerator_N = np.where(is_unmatched_N, 0.5**halvings_N, matched_N)
        log_N += np.where(has_order_N, np.log(np.maximum(numerator_N, 1e-300) / np.maximum(total_N, 1)), 0.0)
        used_N += has_order_N
    # Without any common unigram a sentence has BLEU 0, whatever the smoothing of the other orders.
    has_match_N = _matches(counts.orders[0], kept) > 0
    bleu_N = np.where(has_match_N, np.exp(log_N / np.maximum(used_N, 1)), 0.0) * _brevity(counts.lengths_N, kept)
    return float(bleu_N[kept].mean())


def _matches(order: NgramCounts, kept: Kept) -> Floats:
    """Return, per text, the number of its n-grams that are in another kept text, clipped to the largest count there, `[N]`."""
    kept_E = kept[order.text_E]
    text_E, ngram_E, count_E = order.text_E[kept_E], order.ngram_E[kept_E], order.count_E[kept_E]
    first_E = _first_of_each(ngram_E)
    starts = np.flatnonzero(first_E)
    largest_E = count_E[starts][np.cumsum(first_E) - 1] if len(starts) else count_E
    # The text with the largest count is compared with the second largest: the next entry, if it is of the same n-gram.
    has_second_E = np.append(~first_E[1:], False)
    second_E = np.where(has_second_E, np.append(count_E[1:], 0), 0)
    others_E = np.where(first_E, second_E, largest_E)
    matched_N = np.bincount(text_E, weights=np.minimum(count_E, others_E), minlength=len(kept))
    return matched_N.astype(np.float64)  # without entries, numpy counts in integers


def _brevity(lengths_N: Numbers, kept: Kept) -> Floats:
    """Return the brevity penalty of each text, with the closest length of the other kept texts; of two, the shorter one."""
    found_N = np.ones(len(kept))
    distinct, counts = np.unique(lengths_N[kept], return_counts=True)
    for place, (length, count) in enumerate(zip(distinct.tolist(), counts.tolist(), strict=True)):
        near = [int(distinct[i]) for i in (place - 1, place + 1) if 0 <= i < len(distinct)]
        closest = length if count > 1 else min(near, key=lambda other: (abs(other - length), other))
        if closest > length:
            found_N[lengths_N == length] = np.exp(1 - closest / length) if length else 0.0
    return found_N


def _first_of_each(sorted_E: Numbers) -> NDArray[np.bool_]:
    """Return True where a value of a sorted array differs from the one before it."""
    return np.append(True, sorted_E[1:] != sorted_E[:-1]) if len(sorted_E) else np.zeros(0, dtype=np.bool_)
