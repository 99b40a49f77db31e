from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest

from selfeval.quality.dedupe import quantities
from selfeval.quality.embeddings import unit_rows
from selfeval.quality.semantic_duplicates import SemanticDuplicates

EAST, NORTH = np.array([1.0, 0.0]), np.array([0.0, 1.0])


def test_numbers_and_operators_must_agree() -> None:
    seen = SemanticDuplicates(0.5)
    seen.add("a", "Tom has 3 apples and 5 pens.", EAST)
    seen.add("b", "What is 3 - 5?", EAST)
    assert seen.find("5 pens and 3 apples are Tom's.", EAST) == ("a", 0.0)
    assert seen.find("Tom has 4 apples and 5 pens.", EAST) is None
    assert seen.find("What is 3 + 5?", EAST) is None
    assert seen.find("Compute 3 - 5.", EAST) == ("b", 0.0)
    assert seen.find("Tom has apples and pens.", EAST) is None
    assert seen.find("Three apples and five pens are Tom's.", EAST) == ("a", 0.0)
    assert seen.find("Four apples and five pens are Tom's.", EAST) is None
    seen.add("c", "汤姆有三个苹果", EAST)
    assert seen.find("3个苹果是汤姆的", EAST) == ("c", 0.0)
    assert seen.find("四个苹果是汤姆的", EAST) is None


def test_the_nearest_text_within_the_radius_is_found() -> None:
    seen = SemanticDuplicates(0.3)
    seen.add("east", "red", EAST)
    seen.add("north", "green", NORTH)
    near = np.array([0.6, 0.8])
    found = seen.find("blue", near)
    assert found is not None
    assert found.key == "north"
    assert found.distance == pytest.approx(0.2)
    assert SemanticDuplicates(0.1).find("blue", near) is None
    seen.radius = 0.19
    assert seen.find("blue", near) is None


def test_it_finds_what_a_search_over_all_texts_finds() -> None:
    rng = np.random.default_rng(0)
    texts = [f"text with {number}" for number in rng.integers(0, 3, size=200)]
    vectors = unit_rows(rng.normal(size=(200, 3)).astype(np.float32)).astype(np.float64)
    seen, found = SemanticDuplicates(0.05), 0
    for i, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
        same = [j for j in range(i) if quantities(texts[j]) == quantities(text)]
        best = max(same, key=lambda j: float(vectors[j] @ vector), default=None)
        is_near = best is not None and 1 - vectors[best] @ vector <= 0.05
        twin = seen.find(text, vector)
        assert (None if twin is None else twin.key) == (str(best) if is_near else None)
        found += is_near
        seen.add(str(i), text, vector)
    assert 20 < found < 180


def test_vectors_that_differ_less_than_the_rounding_of_fp32_sums_are_ranked_exactly() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=512)
    # Differences of about 1e-7, below the error of a sum of 512 products in fp32.
    vectors = unit_rows((base + 2e-6 * rng.normal(size=(2500, 512))).astype(np.float32))
    query = unit_rows(base[None].astype(np.float32))[0]
    seen = SemanticDuplicates(0.1)
    for number, vector in enumerate(vectors):
        seen.add(str(number), "text", vector)
    exact = vectors.astype(np.float64) @ query.astype(np.float64)
    found = seen.find("other text", query)
    assert found is not None
    assert found.key == str(exact.argmax())
    assert found.distance == pytest.approx(max(0.0, 1 - exact.max()), abs=1e-12)


def test_ten_thousand_vectors_take_little_more_memory_than_their_numbers() -> None:
    vectors = unit_rows(np.random.default_rng(0).normal(size=(10_000, 64)).astype(np.float32))
    tracemalloc.start()
    seen = SemanticDuplicates(0.1)
    for number, vector in enumerate(vectors):
        seen.add(f"q{number}", "text", vector)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    keys = sum(sys.getsizeof(f"q{number}") + 8 for number in range(10_000))
    assert held - keys < 1.25 * vectors.nbytes


def test_a_negative_radius_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        SemanticDuplicates(-0.1)
