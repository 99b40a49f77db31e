"""Word vectors of the run's own text."""

from __future__ import annotations

import numpy as np
import pytest

from selfeval.config import StaticEmbedderConfig
from selfeval.quality.embeddings.static import StaticEmbedder
from selfeval.quality.embeddings.words import common_direction, pool_words

ENGLISH = ["Tom eats a red apple", "Ann eats a green apple", "the train leaves the station", "the bus leaves the station"] * 30
CHINESE = ["小明吃一个红苹果", "小红吃一个青苹果", "火车离开了车站", "汽车离开了车站"] * 30
METHODS = ("subword", "skip-gram", "cbow", "glove")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("texts", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_texts_of_one_topic_are_near(method: str, texts: list[str]) -> None:
    # Equal texts count once, so each gets a number in the training.
    asked, texts = texts[:4], [f"{text} {number}" for number, text in enumerate(texts)]
    # Two topics differ in little more than one direction, which SIF would remove.
    settings = StaticEmbedderConfig(method=method, pooling="mean", dimensions=16, epochs=100)  # type: ignore[arg-type]
    embedder = StaticEmbedder(texts, settings)
    found = embedder.embed(asked)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    similar = found @ found.T
    assert similar[0, 1] > max(similar[0, 2], similar[0, 3])
    assert similar[2, 3] > max(similar[0, 2], similar[1, 2])
    again = StaticEmbedder(texts, settings)
    assert again.name == embedder.name
    assert (again.embed(asked) == found).all()


def test_unseen_words_have_a_vector_with_subwords_only() -> None:
    texts = [f"{text} {n}" for n, text in enumerate(ENGLISH)]
    parts = StaticEmbedder(texts, StaticEmbedderConfig(dimensions=8, epochs=2))
    whole = StaticEmbedder(texts, StaticEmbedderConfig(method="cbow", dimensions=8, epochs=2))
    assert parts.embed(["applesauce"]).any()
    assert not whole.embed(["applesauce", ""]).any()


def test_the_text_and_the_settings_are_in_the_name() -> None:
    settings = StaticEmbedderConfig(method="glove", dimensions=4, epochs=1)
    names = {
        StaticEmbedder(texts, made).name
        for texts in (["a b"] * 3 + ["b a"], ["a b", "c d", "c d a"])
        for made in (settings, settings.model_copy(update={"pooling": "mean"}))
    }
    assert len(names) == 4


def test_pooling_weighs_words() -> None:
    vectors = {"a": np.array([1, 0], np.float32), "b": np.array([0, 1], np.float32)}
    found = pool_words(["a b b", "", "x"], vectors.get, 2, {"a": 0.5, "b": 0.25})
    # (0.5, 0.25 + 0.25) / 3 words; a text without a known word is zero.
    assert found == pytest.approx(np.array([[0.5 / 3, 0.5 / 3], [0, 0], [0, 0]]))
    assert pool_words(["a b b"], vectors.get, 2, None) == pytest.approx(np.array([[1 / 3, 2 / 3]]))


def test_the_common_direction_is_shared_by_all() -> None:
    vectors = np.array([[3, 0.1], [5, -0.1], [2, 0]], np.float32)
    assert np.abs(common_direction(vectors)) == pytest.approx([1, 0], abs=1e-2)
    assert not common_direction(np.zeros((0, 2), np.float32)).any()
