"""Near-duplicates among very many texts: MinHash proposes candidates, and the exact rule of `dedupe` decides.

`NearDuplicates` keeps every shingle of every text. `SketchedDuplicates` keeps a fixed number of integers per text instead, and
the text itself; it misses a near-duplicate with a small, known probability. `benchmarks/dedupe.py` measures both: the exact
index is faster, also with a million texts, and sketches need a fraction of its memory, the smaller the longer the texts.

Shapes: B bands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfeval.errors import MissingPackageError
from selfeval.quality.dedupe import Compared, NearDuplicates, compared, is_near, quantities, shingles

__all__ = ["GrowingDuplicates", "SketchedDuplicates", "duplicate_index", "recall"]

Integers = NDArray[np.uint64]

_BANDS, _ROWS = 20, 4
_UNSORTED = 4096
"""Texts whose hashes are kept in a dictionary before they are sorted into an array."""


def recall(similarity: float) -> float:
    """Compute the probability that a text is a candidate for one of this Jaccard similarity, 1 − (1 − sʳ)ᵇ.

    Leskovec et al., "Mining of Massive Datasets" (http://www.mmds.org/), section 3.4.2; b = 20 bands of r = 4 minima.

    Example:
        >>> [round(recall(similarity), 4) for similarity in (0.3, 0.7, 0.8, 0.9)]
        [0.1501, 0.9959, 1.0, 1.0]
    """
    return 1.0 - (1.0 - similarity**_ROWS) ** _BANDS


class SketchedDuplicates:
    """An index of texts like `NearDuplicates`, with less memory per text.

    A text is represented by 80 minima of random hashes of its shingles (Broder 1997,
    https://doi.org/10.1109/SEQUEN.1997.666900), in 20 bands. Texts that agree in a band are compared exactly. Texts with other
    numbers share no hash. Equal texts are always found, a near-duplicate with the probability `recall`.

    Args:
        threshold: minimum Jaccard similarity of near-duplicates, in (0, 1].

    Raises:
        MissingPackageError: datasketch is not installed.

    Example:
        >>> seen = SketchedDuplicates(0.8)
        >>> seen.add("q1", "Tom has 3 apples. How many are left?")
        >>> seen.find("tom has 3 apples -- how many are left"), seen.find("Tom has 4 apples. How many are left?")
        ('q1', None)
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._sketch = _sketch()
        self._bands = _Postings()
        self._keys: list[str] = []
        self._folded: list[str] = []
        self._last: tuple[str, Integers] | None = None  # of the last text, which is searched for and then added

    def find(self, text: str) -> str | None:
        """Return the key of an equal text, otherwise of the first near-duplicate that was found, otherwise None."""
        rows = self._near(compared(text))
        same = next((row for row in rows if self._folded[row] == compared(text).folded), None)
        return self._keys[rows[0] if same is None else same] if rows else None

    def find_all(self, text: str) -> list[str]:
        """Return the keys of all near-duplicates that were found, in the order in which they were added."""
        return [self._keys[row] for row in self._near(compared(text))]

    def add(self, key: str, text: str) -> None:
        """Add a text under a key; a text that is equal to an earlier one is not added."""
        folded, hashes_B = compared(text).folded, self._hashes(compared(text))
        if not any(self._folded[row] == folded for row in self._bands.find(hashes_B[-1:])):
            self._bands.add(hashes_B, len(self._keys))
            self._keys.append(key)
            self._folded.append(folded)

    def _near(self, text: Compared) -> list[int]:
        return [row for row in self._bands.find(self._hashes(text)) if self._is_near(row, text)]

    def _is_near(self, row: int, text: Compared) -> bool:
        other = self._folded[row]
        if other == text.folded:
            return True
        # The numbers first: they are cheaper to compare, and a hash may be shared by chance.
        return quantities(other) == text.numbers and is_near(text.parts, shingles(other), self.threshold)

    def _hashes(self, text: Compared) -> Integers:
        """Return a hash of each band and, at the end, one of the whole text."""
        if self._last is None or self._last[0] != text.folded:
            self._last = text.folded, self._new_hashes(text)
        return self._last[1]

    def _new_hashes(self, text: Compared) -> Integers:
        # One object for all texts: making one takes as long as hashing a text.
        self._sketch.clear()
        self._sketch.update_batch([f"{text.numbers}\0{part}".encode("utf-8", "surrogatepass") for part in text.parts])
        minima_BR = np.asarray(self._sketch.hashvalues, dtype=np.uint64).reshape(_BANDS, _ROWS)
        found_B = np.arange(1, _BANDS + 1, dtype=np.uint64)
        for minima_B in minima_BR.T:
            found_B = _mixed(found_B ^ minima_B)
        return np.append(found_B, _text_hash(text.folded))


class GrowingDuplicates:
    """`NearDuplicates` up to a number of texts, and `SketchedDuplicates` of all of them above.

    The results depend on the texts and their order alone.

    Args:
        threshold: minimum Jaccard similarity of near-duplicates, in (0, 1].
        sketch_above: number of texts from which all are sketched.

    Raises:
        MissingPackageError: datasketch is not installed. Raised at the start, not after the first texts.
    """

    def __init__(self, threshold: float, sketch_above: int) -> None:
        self.threshold, self.sketch_above = threshold, sketch_above
        self._sketched = SketchedDuplicates(threshold)
        self._exact: NearDuplicates | None = NearDuplicates(threshold)
        self._texts: list[tuple[str, str]] = []

    def find(self, text: str) -> str | None:
        """Return the key of an equal text, otherwise of the first near-duplicate that was found, otherwise None."""
        return (self._exact or self._sketched).find(text)

    def find_all(self, text: str) -> list[str]:
        """Return the keys of all near-duplicates that were found, in the order in which they were added."""
        return (self._exact or self._sketched).find_all(text)

    def add(self, key: str, text: str) -> None:
        """Add a text under a key; a text that is equal to an earlier one is not added."""
        if self._exact is None:
            self._sketched.add(key, text)
            return
        self._exact.add(key, text)
        self._texts.append((key, text))
        if len(self._texts) > self.sketch_above:
            for known, earlier in self._texts:
                self._sketched.add(known, earlier)
            self._exact, self._texts = None, []


def duplicate_index(threshold: float, sketch_above: int | None) -> NearDuplicates | GrowingDuplicates:
    """Return an empty index of near-duplicates.

    Args:
        threshold: minimum Jaccard similarity of near-duplicates, in (0, 1].
        sketch_above: number of texts from which all are sketched; None for the exact index of any number.

    Raises:
        MissingPackageError: datasketch is needed and not installed.
    """
    return NearDuplicates(threshold) if sketch_above is None else GrowingDuplicates(threshold, sketch_above)


def _sketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise MissingPackageError("finding duplicates by MinHash", "datasketch", extra="data") from error
    return datasketch.MinHash(num_perm=_BANDS * _ROWS, seed=1)


def _mixed(values: Integers) -> Integers:
    """Mix the bits of 64-bit integers: the finaliser of SplitMix64 (https://doi.org/10.1145/2714064.2660195)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _text_hash(folded: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"))


class _Postings:
    """Rows by hash: sorted arrays whose sizes are different powers of two, and a dictionary for the most recent ones.

    A dictionary of all would take about ten times the memory of the arrays.
    """

    def __init__(self) -> None:
        self._recent: dict[int, list[int]] = {}
        self._unsorted = 0
        self._sorted: list[tuple[Integers, NDArray[np.uint32]]] = []

    def add(self, hashes_B: Integers, row: int) -> None:
        for value in hashes_B.tolist():
            self._recent.setdefault(value, []).append(row)
        self._unsorted += 1
        if self._unsorted == _UNSORTED:
            self._sort()

    def _sort(self) -> None:
        pairs = [(value, row) for value, rows in self._recent.items() for row in rows]
        merged = _by_hash(
            *(np.array(part, dtype=kind) for part, kind in zip(zip(*pairs, strict=True), (np.uint64, np.uint32), strict=True))
        )
        self._recent, self._unsorted = {}, 0
        # Equal sizes are merged as digits are carried in a binary number: each posting is sorted log N times.
        while self._sorted and len(self._sorted[-1][0]) <= len(merged[0]):
            other = self._sorted.pop()
            merged = _by_hash(np.concatenate([other[0], merged[0]]), np.concatenate([other[1], merged[1]]))
        self._sorted.append(merged)

    def find(self, hashes_B: Integers) -> list[int]:
        """Return the rows with one of the hashes, in ascending order."""
        found: set[int] = set()
        for value in hashes_B.tolist():
            found.update(self._recent.get(value, ()))
        for hashes, rows in self._sorted:
            found.update(_rows_of(hashes, rows, hashes_B))
        return sorted(found)


def _by_hash(hashes: Integers, rows: NDArray[np.uint32]) -> tuple[Integers, NDArray[np.uint32]]:
    order = np.argsort(hashes, kind="stable")
    return hashes[order], rows[order]


def _rows_of(hashes: Integers, rows: NDArray[np.uint32], wanted_B: Integers) -> Iterator[int]:
    start_B, end_B = np.searchsorted(hashes, wanted_B), np.searchsorted(hashes, wanted_B, side="right")
    for place in np.flatnonzero(end_B > start_B):
        yield from rows[start_B[place] : end_B[place]].tolist()
