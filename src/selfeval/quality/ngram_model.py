"""An n-gram language model of a domain: interpolated Kneser-Ney over words, or characters where a script has no spaces.

    P_k(w | h) = max(c(h w) − d_k, 0) / c(h) + d_k N(h) / c(h) · P_{k−1}(w | h'),   k = n, ..., 1
    P_0(w)     = 1 / (V + 1)

`h` has k − 1 units and `h'` is `h` without its first one; N(h) is the number of distinct units seen after `h`. At the highest
order c counts occurrences; below it, c(h w) is the number of distinct units seen before `h w`, and c(h) its sum over w. A
context that was never seen has P_k = P_{k−1}. Kneser and Ney 1995 (https://doi.org/10.1109/ICASSP.1995.479394), interpolated
as in Chen and Goodman 1999, section 4.1.6 (https://doi.org/10.1006/csla.1999.0128). The discount of each order is
d = n_1 / (n_1 + 2 n_2), with n_i the number of n-grams of count i (Ney et al. 1994, https://doi.org/10.1006/csla.1994.1001).

P_0 gives each of the V known units (the end of a text included) and the unknown unit the same probability, so a unit outside
the vocabulary has a small probability instead of none. `nltk.lm.KneserNeyInterpolated` has no P_0 and looks through all
contexts for each probability, which takes minutes for a few thousand sentences; the tests compare with it on small texts.

Shapes: P positions (the units of all texts and one end for each), U distinct n-grams of an order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from selfeval.quality.dedupe import units

__all__ = ["NgramModel", "cross_perplexities"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Units = Sequence[str]
"""Words or characters of a text."""

_START, _END, _UNKNOWN = 0, 1, 2
_FIRST = 3
"""Id of the first unit of the vocabulary; the smaller ids are the start and the end of a text, and unknown units."""
_DISCOUNT = 0.75
"""Discount of an order without n-grams of count 1 or 2, for which the estimate is undefined. Kneser and Ney's usual value."""


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order.

    Attributes:
        grams_U: keys of the n-grams, sorted; the id of an n-gram is its place.
        contexts_U: keys of the contexts, sorted.
        shares_U: max(c(h w) − d, 0) / c(h), by n-gram.
        left_U: d N(h) / c(h), the probability that is left for the lower order, by context.
    """

    grams_U: Ints
    contexts_U: Ints
    shares_U: Floats
    left_U: Floats


class NgramModel:
    """An interpolated Kneser-Ney model. See the module docstring for its definition.

    Texts are split as in `selfeval.quality.dedupe.units`: case and punctuation are folded, words are the units, and characters
    in scripts without spaces.

    Args:
        texts: training texts; texts without a unit are left out.
        order: number of units per n-gram, n >= 1. Default: 3.
        discount: Optional. The same discount for all orders, in (0, 1). Default: estimated for each order.

    Raises:
        ValueError: no text has a unit, or order or discount is out of range.

    Example:
        >>> model = NgramModel(["Tom has 3 apples.", "Ann has 4 pears.", "Tom has 4 pears."])
        >>> near, far = model.perplexities(["Ann has 3 apples.", "The stock market fell."])
        >>> near < far
        True
    """

    def __init__(self, texts: Iterable[str], order: int = 3, *, discount: float | None = None) -> None:
        self._train([units(text) for text in texts], order, discount)

    @classmethod
    def of_units(cls, parts: Sequence[Units], order: int = 3) -> NgramModel:
        """Train on texts that are split into units already; see the class.

        Args:
            parts: units of each training text.
            order: number of units per n-gram, n >= 1. Default: 3.
        """
        model = cls.__new__(cls)
        model._train(parts, order, None)
        return model

    def _train(self, parts: Sequence[Units], order: int, discount: float | None) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        if discount is not None and not 0 < discount < 1:
            raise ValueError(f"discount must be in (0, 1), got {discount}")
        count, parts = len(parts), [part for part in parts if part]
        if not parts:
            raise ValueError(f"an n-gram model needs a text with a word, got {count} texts without any")
        self.order = order
        self.vocabulary = {unit: _FIRST + i for i, unit in enumerate(dict.fromkeys(unit for part in parts for unit in part))}
        self._size = _FIRST + len(self.vocabulary)
        self._orders = self._count(self._windows(parts), discount)

    def log_probs(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Return, for each text, the sum of its log-probs in nats, and the number of its units plus one for its end.

        Args:
            texts: N texts; a text without units has only its end.
        """
        return self._log_probs([units(text) for text in texts])

    def _log_probs(self, parts: Sequence[Units]) -> list[tuple[float, int]]:
        if not parts:
            return []
        logs_P = np.log(self._probabilities(self._windows(parts)))
        counts = [len(part) + 1 for part in parts]
        starts = np.cumsum([0, *counts[:-1]])
        return list(zip(np.add.reduceat(logs_P, starts).tolist(), counts, strict=True))

    def perplexities(self, texts: Sequence[str]) -> list[float]:
        """Return the perplexity per unit of each text, exp(−Σ log P / (units + 1)), >= 1.

        Args:
            texts: N texts.
        """
        return self.perplexities_of_units([units(text) for text in texts])

    def perplexities_of_units(self, parts: Sequence[Units]) -> list[float]:
        """Return the perplexity of texts that are split into units already; see `perplexities`."""
        return [math.exp(-total / count) for total, count in self._log_probs(parts)]

    # -- counting -------------------------------------------------------------------------------------------------------

    def _windows(self, parts: Sequence[Units]) -> Ints:
        """Return `[P, order]`, the ids of each unit (last column) and of the units before it, padded with the start."""
        padding = [_START] * (self.order - 1)
        flat: list[int] = []
        for part in parts:
            flat += [*padding, *(self.vocabulary.get(unit, _UNKNOWN) for unit in part), _END]
        windows: Ints = np.lib.stride_tricks.sliding_window_view(np.array(flat, dtype=np.int64), self.order)
        # Only units and ends are predicted, never the padding: it would take probability from them.
        found: Ints = windows[windows[:, -1] != _START]
        return found

    def _count(self, windows: Ints, discount: float | None) -> list[_Order]:
        """Count the n-grams of each order, from one unit up."""
        grams_P, contexts_P = np.zeros(len(windows), np.int64), np.zeros(len(windows), np.int64)
        levels: list[tuple[Ints, Ints, Ints, Ints]] = []
        for k in range(1, self.order + 1):
            # An n-gram is named by the id of its last k − 1 units and the unit before them, so that numbers stay small. The
            # context has the same units without the last one.
            left_P = windows[:, self.order - k]
            grams_U, first_U, grams_P = np.unique(grams_P * self._size + left_P, return_index=True, return_inverse=True)
            keys_P = contexts_P * self._size + left_P if k > 1 else np.zeros(len(windows), np.int64)
            contexts_U, contexts_P = np.unique(keys_P, return_inverse=True)
            levels.append((grams_U, contexts_U, contexts_P[first_U], np.bincount(grams_P)))
        # Below the highest order: the number of distinct n-grams that are longer by one unit to the left.
        longer = [np.bincount(above[0] // self._size, minlength=len(level[0])) for level, above in pairwise(levels)]
        counts = [*longer, levels[-1][3]]
        return [_smoothed(*level[:3], count, discount) for level, count in zip(levels, counts, strict=True)]

    # -- probabilities --------------------------------------------------------------------------------------------------

    def _probabilities(self, windows: Ints) -> Floats:
        """Return `[P]`, the probability of the last unit of each window after the others."""
        # Every known unit, the end, and the unknown unit; the start is never predicted.
        found_P = np.full(len(windows), 1 / (len(self.vocabulary) + 2))
        grams_P, contexts_P = np.zeros(len(windows), np.int64), np.zeros(len(windows), np.int64)
        for k, level in enumerate(self._orders, start=1):
            left_P = windows[:, self.order - k]
            grams_P = _ids(level.grams_U, _key(grams_P, left_P, self._size))
            contexts_P = _ids(level.contexts_U, _key(contexts_P, left_P, self._size)) if k > 1 else contexts_P
            shares_P = np.where(grams_P >= 0, level.shares_U[grams_P], 0.0)
            found_P = np.where(contexts_P >= 0, shares_P + level.left_U[contexts_P] * found_P, found_P)
        return found_P


def _smoothed(grams_U: Ints, contexts_U: Ints, context_of_U: Ints, counts_U: Ints, discount: float | None) -> _Order:
    """Return the discounted shares of the n-grams of an order."""
    d = _discount(counts_U) if discount is None else discount
    totals, kinds = np.bincount(context_of_U, weights=counts_U), np.bincount(context_of_U)
    return _Order(grams_U, contexts_U, np.maximum(counts_U - d, 0.0) / totals[context_of_U], d * kinds / totals)


def _discount(counts_U: Ints) -> float:
    once, twice = int((counts_U == 1).sum()), int((counts_U == 2).sum())
    return once / (once + 2 * twice) if once and twice else _DISCOUNT


def _key(ids_P: Ints, left_P: Ints, size: int) -> Ints:
    # An n-gram whose shorter one is unknown is unknown too; no key is negative.
    keys: Ints = np.where(ids_P >= 0, ids_P * size + left_P, -1)
    return keys


def _ids(keys_U: Ints, keys_P: Ints) -> Ints:
    """Return the place of each key among the sorted ones, or -1."""
    places_P = np.minimum(np.searchsorted(keys_U, keys_P), len(keys_U) - 1)
    found: Ints = np.where(keys_U[places_P] == keys_P, places_P, -1)
    return found


def cross_perplexities(texts: Sequence[str], order: int = 3, folds: int = 5) -> list[float]:
    """Return the perplexity per unit of each text under a model of the other texts: each fold by a model of the other folds.

    A high value marks a text that is unlike the others. Equal texts are in one fold: a copy would otherwise know its twin.

    Args:
        texts: N texts.
        order: number of units per n-gram. Default: 3.
        folds: number of models, >= 2. Default: 5.

    Raises:
        ValueError: fewer than two distinct texts have a unit, or folds is below 2.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    # Splitting takes most of the time, so each text is split once and not by each model.
    parts = [units(text) for text in texts]
    forms = [" ".join(part) for part in parts]
    place = {form: i % folds for i, form in enumerate(dict.fromkeys(filter(None, forms)))}
    if len(place) < 2:
        raise ValueError(f"perplexity under a model of the other texts needs two distinct texts, got {len(place)}")
    fold_of = [place.get(form, 0) for form in forms]
    found = [0.0] * len(parts)
    for fold in set(fold_of):
        own = [i for i, its in enumerate(fold_of) if its == fold]
        model = NgramModel.of_units([part for part, its in zip(parts, fold_of, strict=True) if its != fold], order)
        for i, value in zip(own, model.perplexities_of_units([parts[i] for i in own]), strict=True):
            found[i] = value
    return found
