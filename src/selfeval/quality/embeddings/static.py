"""Word vectors trained on the run's own text, pooled to vectors of texts.

Training takes seconds, and embedding needs no pass of a model. The vectors know only the words of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from selfeval.config import StaticEmbedderConfig
from selfeval.errors import MissingPackageError
from selfeval.quality.dedupe import units
from selfeval.quality.embeddings.glove import cooccurrences, train_glove, vocabulary
from selfeval.quality.embeddings.protocol import Vectors, unit_rows
from selfeval.quality.embeddings.words import WordVector, common_direction, pool_words, rarity_weights
from selfeval.store import fingerprint

__all__ = ["StaticEmbedder", "check_static", "train_words"]


class StaticEmbedder:
    """Embeds texts by the vectors of their words.

    Args:
        texts: the text that the word vectors are trained on. Chinese is split into characters (`dedupe.units`).
        settings: Optional. Default: subword vectors with SIF pooling.
        seed: seed of the training. Default: 0.

    Raises:
        MissingPackageError: gensim is not installed, and the method is not GloVe.
    """

    def __init__(self, texts: Sequence[str], settings: StaticEmbedderConfig | None = None, *, seed: int = 0) -> None:
        self.settings = settings or StaticEmbedderConfig()
        corpus = [words for text in dict.fromkeys(texts) if (words := units(text))]
        self.vector = train_words(corpus, self.settings, seed)
        self._weights = rarity_weights(corpus) if self.settings.pooling == "sif" else None
        self._common = np.zeros(self.settings.dimensions, np.float32)
        if self.settings.pooling == "sif":
            self._common = common_direction(self._pooled(list(dict.fromkeys(texts))))
        self._name = f"static-{self.settings.method}-{fingerprint([corpus, self.settings.model_dump(), seed])[:8]}"

    @property
    def name(self) -> str:
        """Identifier of the method, its settings and the text that it was trained on."""
        return self._name

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return `[N, D]` vectors of length 1; a text without a known word has a row of zeros."""
        pooled_ND = self._pooled(texts)
        return unit_rows(pooled_ND - np.outer(pooled_ND @ self._common, self._common).astype(np.float32))

    def _pooled(self, texts: Sequence[str]) -> Vectors:
        return pool_words(texts, self.vector, self.settings.dimensions, self._weights)


def train_words(corpus: Sequence[Sequence[str]], settings: StaticEmbedderConfig, seed: int = 0) -> WordVector:
    """Train word vectors, with one thread, so that the seed determines them.

    CBOW and skip-gram: Mikolov et al. 2013 (https://arxiv.org/abs/1301.3781, https://arxiv.org/abs/1310.4546); subword:
    Bojanowski et al. 2017 (https://arxiv.org/abs/1607.04606); GloVe: `glove`.

    Args:
        corpus: the words of each text.
        settings: method, dimensions, window, epochs and least count.
        seed: seed of the training. Default: 0.

    Returns:
        A function from a word to its vector. With `subword`, every word has one; else a word below the least count has none.

    Raises:
        MissingPackageError: gensim is not installed, and the method is not GloVe.
    """
    words = vocabulary(corpus, settings.least_count)
    if not words:
        return lambda word: None
    if settings.method == "glove":
        counts = cooccurrences(corpus, words, settings.window)
        table = dict(zip(words, train_glove(counts, settings.dimensions, settings.epochs, seed), strict=True))
        return table.get
    vectors = _gensim(corpus, settings, seed).wv
    if settings.method == "subword":
        return lambda word: np.asarray(vectors[word], np.float32)
    return {word: np.asarray(vectors[word], np.float32) for word in words}.get


def _gensim(corpus: Sequence[Sequence[str]], settings: StaticEmbedderConfig, seed: int) -> Any:
    models = _import_models()
    options: dict[str, Any] = {
        "vector_size": settings.dimensions,
        "window": settings.window,
        "epochs": settings.epochs,
        "min_count": settings.least_count,
        "sg": int(settings.method != "cbow"),
        "seed": seed,
        "workers": 1,
    }
    if settings.method == "subword":
        # 100,000 buckets of n-grams in place of gensim's two million, which take 800 MB whatever the text.
        return models.FastText(sentences=corpus, bucket=100_000, **options)
    return models.Word2Vec(sentences=corpus, **options)


def check_static(settings: StaticEmbedderConfig) -> None:
    """Check that the package of the method is installed.

    Raises:
        MissingPackageError: gensim is not installed, and the method is not GloVe.
    """
    if settings.method != "glove":
        _import_models()


def _import_models() -> ModuleType:
    try:
        import gensim.models
    except ImportError as error:
        raise MissingPackageError("the static embedder", "gensim", extra="data") from error
    found: ModuleType = gensim.models
    return found
