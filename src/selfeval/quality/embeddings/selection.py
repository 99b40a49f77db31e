"""Choice of a representation without labels: by whether two views of a text recognise each other among those of other texts.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np

from selfeval.quality.embeddings.protocol import Vectors

__all__ = ["drop_words", "evenly_spaced", "view_agreement"]

_KEPT = 0.7
"""Share of the words of a text that a view keeps, on average."""
_TEMPERATURE = 0.05
"""Temperature of the softmax over cosines, as in SimCSE (Gao et al. 2021, https://arxiv.org/abs/2104.08821)."""
_FEW_WORDS = 4
"""A text with fewer parts between spaces is split into characters, as one in Chinese has to be."""


def view_agreement(first_ND: Vectors, second_ND: Vectors) -> float:
    """Return the mean log-probability with which a view of a text finds the other view of it among those of all N texts.

    (1/N) sum_i log(exp(a_i . b_i / t) / sum_j exp(a_i . b_j / t)) with t = 0.05: the InfoNCE bound without its constant (van
    den Oord et al. 2018, https://arxiv.org/abs/1807.03748). Skean et al. 2025 (https://arxiv.org/abs/2502.02013) compare such
    measures as choices of a layer without labels.

    Args:
        first_ND: vectors of length 1.
        second_ND: the vectors of the other views, in the same order.

    Returns:
        A number up to 0; -log N if the vectors say nothing.

    Example:
        >>> view_agreement(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)) == -np.log(2)
        True
    """
    logits_NN = (first_ND.astype(np.float64) @ second_ND.astype(np.float64).T) / _TEMPERATURE
    largest_N1 = logits_NN.max(axis=1, keepdims=True)
    total_N = largest_N1[:, 0] + np.log(np.exp(logits_NN - largest_N1).sum(axis=1))
    return float((np.diag(logits_NN) - total_N).mean())


def drop_words(text: str, random: Random) -> str:
    """Return a view of a text: 30% of its words are dropped at random, or of its characters if it has hardly any spaces.

    A view is never empty: a text of which nothing is left is returned as it is.
    """
    words = text.split()
    separator, parts = (" ", words) if len(words) >= _FEW_WORDS else ("", list(text))
    return separator.join(part for part in parts if random.random() < _KEPT).strip() or text


def evenly_spaced(texts: Sequence[str], count: int) -> list[str]:
    """Return at most `count` distinct texts that are not blank, evenly spaced in their order."""
    distinct = [text for text in dict.fromkeys(texts) if text.strip()]
    if len(distinct) <= count:
        return distinct
    return [distinct[i * len(distinct) // count] for i in range(count)]
