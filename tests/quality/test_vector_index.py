"""The index of vectors: exact below a size, close to it above, and never one of other texts or of a damaged file."""

from __future__ import annotations

import doctest
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from full_disk import FullDisk
from selfeval.errors import MissingPackageError, StorageError
from selfeval.quality import vector_index
from selfeval.quality.embeddings import Vectors, unit_rows
from selfeval.quality.vector_index import Contents, VectorIndex, text_hash

pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")

FEW = 3000
"""Vectors above the limit of the exact search in these tests."""


def vectors(count: int, dimensions: int = 16, seed: int = 0) -> Vectors:
    """Groups of different directions and a common spread, as texts of a domain have."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(50, dimensions))
    return unit_rows((centres[rng.integers(50, size=count)] + 0.7 * rng.normal(size=(count, dimensions))).astype(np.float32))


def contents(count: int, embedder: str = "test") -> Contents:
    return Contents.of(embedder, [(f"q{n}", f"text {n}") for n in range(count)])


def brute_force(made: Vectors, queries: Vectors, count: int) -> Any:
    return np.argsort(-(queries.astype(np.float64) @ made.T.astype(np.float64)), axis=1)[:, :count]


def test_the_search_is_exact_below_the_limit() -> None:
    made, queries = vectors(500), vectors(20, seed=1)
    found = VectorIndex.build(made, contents(500)).search(queries, 7)
    expected = brute_force(made, queries, 7)
    for near, rows, query in zip(found, expected, queries, strict=True):
        assert near.rows.tolist() == rows.tolist()
        np.testing.assert_allclose(near.similarities, made[rows] @ query, atol=1e-6)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the approximate search begin at fewer vectors."""
    monkeypatch.setattr(vector_index, "EXACT", FEW)


@pytest.mark.usefixtures("few")
def test_the_search_finds_nearly_all_neighbours_above_the_limit(tmp_path: Path) -> None:
    made, queries = vectors(FEW), vectors(50, seed=1)
    index = VectorIndex.build(made, contents(FEW))
    index.save(tmp_path / "many.faiss")
    opened = VectorIndex.open(tmp_path / "many.faiss", contents(FEW))
    assert opened is not None
    expected = brute_force(made, queries, 10)
    for one in (index, opened):
        found = one.search(queries, 10)
        shared = [len({*near.rows.tolist()} & {*rows.tolist()}) for near, rows in zip(found, expected, strict=True)]
        assert np.mean(shared) / 10 >= 0.95
        np.testing.assert_array_equal(one.vectors([3, FEW - 1]), made[[3, FEW - 1]])
        # Rows far away from the query, in groups that are not searched otherwise.
        far = np.argsort(made @ queries[0])[:5]
        [near] = one.search(queries[:1], 3, among=far.tolist())
        assert near.rows.tolist() == far[::-1][:3].tolist()
        np.testing.assert_allclose(near.similarities, made[near.rows] @ queries[0], atol=1e-6)
    assert type(opened._faiss).__name__ == "IndexIVFFlat"


@pytest.mark.usefixtures("few")
def test_threads_that_share_an_opened_index_read_the_same_vectors(tmp_path: Path) -> None:
    """Two pages of `selfeval view` at once: faiss's table of the rows must not be built by the first reader."""
    made = vectors(FEW)
    VectorIndex.build(made, contents(FEW)).save(tmp_path / "many.faiss")
    for seed in range(5):
        opened = VectorIndex.open(tmp_path / "many.faiss")
        assert opened is not None
        start = Barrier(8)

        def read(number: int, index: VectorIndex = opened, start: Barrier = start, seed: int = seed) -> bool:
            rows = np.random.default_rng([seed, number]).permutation(FEW)[:500]
            start.wait()
            is_equal = np.array_equal(index.vectors(rows.tolist()), made[rows])
            [near] = index.search(made[rows[:1]], 1, among=rows.tolist())
            return is_equal and near.rows.tolist() == [rows[0]]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(8)))


@pytest.mark.usefixtures("few")
def test_many_rows_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = vectors(FEW)
    index = VectorIndex.build(made, contents(FEW))
    monkeypatch.setattr(vector_index, "EXACT", 100)
    [near] = index.search(made[:1], 10, among=range(1, FEW, 2))
    assert len(near.rows) == 10
    assert {*(near.rows % 2).tolist()} == {1}


def test_rows_can_be_left_out() -> None:
    made = vectors(100)
    index = VectorIndex.build(made, contents(100))
    [near] = index.search(made[:1], 3, among=[8, 50, 31, 77])
    expected = sorted([8, 50, 31, 77], key=lambda row: -float(made[row] @ made[0]))[:3]
    assert near.rows.tolist() == expected
    assert [len(near.rows) for near in index.search(made[:2], 3, among=[])] == [0, 0]
    assert len(index.search(made[:1], 1000)[0].rows) == 100
    with pytest.raises(ValueError, match="count must be positive, got 0"):
        index.search(made[:1], 0)


def test_an_opened_index_gives_the_same_vectors_and_neighbours(tmp_path: Path) -> None:
    made, path = vectors(300), tmp_path / "search" / "questions.faiss"
    built = VectorIndex.build(made, contents(300))
    built.save(path)
    opened = VectorIndex.open(path)
    assert opened is not None
    assert opened.contents == contents(300)
    np.testing.assert_array_equal(opened.vectors(range(300)), made)
    for one, other in zip(built.search(made[:9], 5), opened.search(made[:9], 5), strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.similarities.tolist() == other.similarities.tolist()


def test_an_index_of_other_texts_or_of_another_embedder_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "questions.faiss"
    assert VectorIndex.open(path) is None
    VectorIndex.build(vectors(5), contents(5)).save(path)
    changed = Contents.of("test", [*((f"q{n}", f"text {n}") for n in range(4)), ("q4", "another text")])
    renamed = Contents.of("test", [*((f"q{n}", f"text {n}") for n in range(4)), ("q5", "text 4")])
    for other in (contents(6), contents(5, "other"), changed, renamed):
        assert VectorIndex.open(path, other) is None
    assert VectorIndex.open(path, contents(5)) is not None


@pytest.mark.parametrize("damage", ["cut", "flipped", "facts", "schema", "count", "keys", "swapped"])
def test_a_damaged_index_is_built_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "questions.faiss"
    VectorIndex.build(vectors(40), contents(40)).save(path)
    facts, data = path.with_suffix(".json"), path.read_bytes()
    text = facts.read_text(encoding="utf-8")
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "facts":
        facts.write_text(text[: len(text) // 2], encoding="utf-8")
    elif damage == "schema":
        facts.write_text(text.replace('"schema": 2', '"schema": 1'), encoding="utf-8")
    elif damage == "count":
        facts.write_text(text.replace('"q39"', '"q39", "q40"'), encoding="utf-8")
    elif damage == "keys":
        facts.write_text(text.replace('"q39"', '"forged"'), encoding="utf-8")
    else:
        VectorIndex.build(vectors(40, seed=3), contents(40)).save(tmp_path / "other.faiss")
        path.write_bytes((tmp_path / "other.faiss").read_bytes())
    assert VectorIndex.open(path) is None
    calls = []

    def embed() -> Vectors:
        calls.append(1)
        return vectors(40)

    for _ in range(2):
        found = VectorIndex.open_or_build(path, contents(40), embed, pytest.fail)
        np.testing.assert_array_equal(found.vectors([39]), vectors(40)[[39]])
    assert calls == [1], "the second time it is opened"


def test_an_index_that_another_user_wrote_is_built_again_without_parsing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "questions.faiss"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "theirs"))
    VectorIndex.build(vectors(40), contents(40)).save(path)
    assert VectorIndex.open(path) is not None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine"))
    with monkeypatch.context() as patch:
        patch.setattr(vector_index._import_faiss(), "read_index", lambda *_: pytest.fail("a foreign file was parsed"))
        assert VectorIndex.open(path) is None  # without a key
        VectorIndex.open_or_build(tmp_path / "other.faiss", contents(3), lambda: vectors(3), pytest.fail)
        assert VectorIndex.open(path) is None  # with another key
        built = VectorIndex.open_or_build(path, contents(40), lambda: vectors(40), pytest.fail)
    assert built.search(vectors(40)[:1], 1)[0].rows.tolist() == [0]
    assert VectorIndex.open(path) is not None


def test_without_a_place_for_the_key_the_index_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("a file in place of the folder", encoding="utf-8")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    notes: list[str] = []
    index = VectorIndex.open_or_build(tmp_path / "q.faiss", contents(9), lambda: vectors(9), notes.append)
    assert index.search(vectors(9)[:1], 1)[0].rows.tolist() == [0]
    assert [note.startswith("the index is not saved, so the next search builds it again: cannot write ") for note in notes] == [
        True
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def test_an_index_in_a_folder_that_is_not_writable_is_kept_in_memory(tmp_path: Path) -> None:
    (tmp_path / "search").write_text("a file in place of the folder", encoding="utf-8")
    notes: list[str] = []
    index = VectorIndex.open_or_build(tmp_path / "search" / "q.faiss", contents(9), lambda: vectors(9), notes.append)
    assert index.search(vectors(9)[:1], 1)[0].rows.tolist() == [0]
    assert len(notes) == 1
    assert notes[0].startswith("the index is not saved, so the next search builds it again: cannot write ")


def test_an_index_is_not_saved_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faiss's own writer notices it only if the index is larger than a buffer of the C library."""
    index = VectorIndex.build(vectors(9), contents(9))
    index.save(tmp_path / "q.faiss")
    before = (tmp_path / "q.faiss").read_bytes()
    disk = FullDisk(tmp_path, monkeypatch)
    for _ in range(2):  # there is no room for the index, and then none for what it contains
        with pytest.raises(StorageError, match=r"q\.(faiss|json)"):
            index.save(tmp_path / "q.faiss")
        disk.free()
    assert (tmp_path / "q.faiss").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("few")
def test_the_index_depends_on_the_vectors_alone() -> None:
    one, other = (VectorIndex.build(vectors(FEW, 8), contents(FEW)) for _ in range(2))
    for a, b in zip(one.search(vectors(20, 8, seed=4), 5), other.search(vectors(20, 8, seed=4), 5), strict=True):
        assert a.rows.tolist() == b.rows.tolist()


def test_numbers_of_vectors_and_names_must_agree() -> None:
    with pytest.raises(ValueError, match="got 3 vectors, 4 keys and 4 hashes"):
        VectorIndex.build(vectors(3), contents(4))


def test_texts_are_told_apart_by_their_hashes() -> None:
    # The first 64 bits of the SHA-256 of "abc": FIPS 180-2, appendix B.1.
    assert text_hash("abc") == "ba7816bf8f01cfea"
    assert text_hash("\ud800") != text_hash("")


def test_without_faiss_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingPackageError, match=r"needs the package faiss; install it with: .*self-evaluator\[data\]"):
        VectorIndex.build(vectors(3), contents(3))


def test_the_examples_of_the_documentation() -> None:
    found = doctest.testmod(vector_index)
    assert (found.failed, found.attempted > 0) == (0, True)
