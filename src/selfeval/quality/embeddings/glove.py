"""GloVe: word vectors from the counts of words that occur near each other (Pennington et al. 2014,
https://aclanthology.org/D14-1162).

gensim does not train GloVe, and the packages that do have not been maintained for years. This is the paper's objective and
optimiser (AdaGrad over shuffled entries), with mini-batches as sparse products; there are no threads, so a seed determines the
result. The corpus of a run takes seconds; for billions of words, use the authors' program.

Shapes: V words, D dimensions, E non-zero counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cooccurrences", "train_glove", "vocabulary"]

_LARGEST, _POWER = 100.0, 0.75
"""x_max and alpha of the weighting function."""
_RATE = 0.05
_BATCH = 1 << 15


def vocabulary(texts: Sequence[Sequence[str]], least_count: int) -> list[str]:
    """Return the words that occur at least `least_count` times, the most frequent first, equal ones in alphabetical order."""
    counts = Counter(word for words in texts for word in words)
    return sorted((word for word, count in counts.items() if count >= least_count), key=lambda word: (-counts[word], word))


def cooccurrences(texts: Sequence[Sequence[str]], words: Sequence[str], window: int) -> Any:
    """Count how often words occur near each other, each pair with weight 1 / distance (section 4.2 of the paper).

    Words outside of the vocabulary are dropped before distances are counted, as in the authors' program.

    Args:
        texts: the words of each text; a window does not extend over its ends.
        words: the vocabulary.
        window: largest distance.

    Returns:
        The symmetric counts, a `scipy.sparse.csr_array` `[V, V]`.

    Example:
        >>> cooccurrences([["a", "b", "a"]], ["a", "b"], window=2).toarray().tolist()
        [[1.0, 2.0], [2.0, 0.0]]
    """
    from scipy.sparse import coo_array

    numbers = {word: number for number, word in enumerate(words)}
    total = coo_array((len(words), len(words)), dtype=np.float64).tocsr()
    # -1 between texts, `window` times, so that one shifted comparison serves the whole corpus.
    gap = [-1] * window
    line = np.array([n for text in texts for n in [*(numbers[word] for word in text if word in numbers), *gap]], dtype=np.int64)
    for distance in range(1, min(window, len(line) - 1) + 1):
        left, right = line[:-distance], line[distance:]
        both = (left >= 0) & (right >= 0)
        weights = np.full(int(both.sum()), 1.0 / distance)
        total = total + coo_array((weights, (left[both], right[both])), shape=total.shape).tocsr()
    return (total + total.T).tocsr()


def train_glove(counts: Any, dimensions: int, epochs: int, seed: int = 0) -> NDArray[np.float32]:
    """Minimise sum_ij f(X_ij) (w_i . c_j + b_i + b'_j - log X_ij)^2 with f(x) = min(1, (x / 100)^0.75).

    Args:
        counts: X, a sparse matrix `[V, V]` (`cooccurrences`).
        dimensions: D.
        epochs: passes over the non-zero counts.
        seed: seed of the initial values and of the order. Default: 0.

    Returns:
        w + c, `[V, D]`, as the paper recommends (section 4.2).
    """
    random = np.random.default_rng(seed)
    entries = counts.tocoo()
    left, right = entries.coords
    target, weight = np.log(entries.data), np.minimum(1.0, (entries.data / _LARGEST) ** _POWER)
    # The bias is a last column: of w it meets a constant 1 in c, and the other way round.
    sides = [(random.random((counts.shape[0], dimensions + 1)) - 0.5) / dimensions for _ in range(2)]
    squares = [np.ones_like(side) for side in sides]
    for _ in range(epochs):
        order = random.permutation(len(target))
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            _step(sides, squares, left[part], right[part], target[part], weight[part])
    found: NDArray[np.float32] = (sides[0] + sides[1])[:, :dimensions].astype(np.float32)
    return found


def _step(
    sides: list[NDArray[np.float64]],
    squares: list[NDArray[np.float64]],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    target: NDArray[np.float64],
    weight: NDArray[np.float64],
) -> None:
    """Take one AdaGrad step on a batch of counts; `sides` and `squares` are changed in place."""
    from scipy.sparse import coo_array

    words, contexts = sides
    fit = np.einsum("ed,ed->e", words[left, :-1], contexts[right, :-1]) + words[left, -1] + contexts[right, -1]
    shape = (len(words), len(words))
    errors = coo_array((weight * (fit - target), (left, right)), shape=shape).tocsr()
    gradients = [_gradient(errors, contexts), _gradient(errors.T.tocsr(), words)]
    for side, square, gradient in zip(sides, squares, gradients, strict=True):
        square += gradient**2
        side -= _RATE * gradient / np.sqrt(square)


def _gradient(errors: Any, others: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.concatenate([errors @ others[:, :-1], errors.sum(axis=1)[:, None]], axis=1)
    return found
