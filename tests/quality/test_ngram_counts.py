from __future__ import annotations

import random

import numpy as np
import pytest

from selfeval.quality.diversity import distinct_n
from selfeval.quality.ngram_counts import count_ngrams, distinct_share, self_bleu

sacrebleu = pytest.importorskip("sacrebleu")


def reference(texts: list[str]) -> float:
    """Self-BLEU by its definition, a sentence against all others."""
    scores = [
        sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1 :], tokenize="none", smooth_method="exp").score / 100
        for i, text in enumerate(texts)
    ]
    return sum(scores) / len(scores)


def measured(texts: list[str]) -> float:
    return self_bleu(count_ngrams(texts), np.ones(len(texts), dtype=np.bool_))


@pytest.mark.parametrize("words", [4, 12, 40])
@pytest.mark.parametrize("longest", [3, 12])
def test_self_bleu_is_the_mean_of_sacrebleu_over_the_sentences(words: int, longest: int) -> None:
    """Short sentences lack orders; with many words, some sentences share nothing; lengths differ, so some are too short."""
    rng = random.Random(words + longest)
    for n in (2, 5, 20):
        texts = [" ".join(f"w{rng.randrange(words)}" for _ in range(rng.randint(1, longest))) for _ in range(n)]
        assert measured(texts) == pytest.approx(reference(texts), abs=1e-12)


def test_it_counts_only_the_kept_texts() -> None:
    rng = random.Random(3)
    texts = [" ".join(rng.choice("abcdef") for _ in range(rng.randint(1, 9))) for _ in range(30)]
    counts, kept = count_ngrams(texts), np.arange(30) % 3 != 1
    rest = [text for text, is_kept in zip(texts, kept, strict=True) if is_kept]
    assert self_bleu(counts, kept) == pytest.approx(reference(rest), abs=1e-12)
    for n in (1, 2, 4):
        assert distinct_share(counts, n, kept) == pytest.approx(distinct_n(rest, n))


def test_equal_texts_have_one_and_different_ones_zero() -> None:
    assert measured(["a b c d e"] * 4) == pytest.approx(1.0)
    assert measured(["a b c", "d e f"]) == 0.0
    assert measured(["我爱你们", "我爱你们"]) == pytest.approx(1.0)


def test_texts_without_words_are_no_error() -> None:
    assert measured(["", "a b"]) == 0.0
    assert np.isnan(measured(["a b"]))
    assert np.isnan(distinct_share(count_ngrams(["", "a"]), 2, np.array([True, True])))
