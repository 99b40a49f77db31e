"""The vectors in the run folder: kept, damaged, merged, and shared by two processes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from selfeval.errors import EndpointError, StorageError
from selfeval.quality.embeddings.cache import CachedEmbedder
from selfeval.quality.embeddings.protocol import Vectors, unit_rows
from selfeval.quality.embeddings.vector_files import open_vectors, write_vectors
from selfeval.texts import text_digest


class Lengths:
    """Embeds by counts of letters, and remembers the texts that it was asked for."""

    def __init__(self, name: str = "lengths") -> None:
        self.name, self.asked = name, list[str]()

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        rows = [[text.count("a"), text.count("b"), len(text)] for text in texts]
        return unit_rows(np.array(rows, np.float32).reshape(len(texts), 3))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def test_a_text_is_embedded_once(tmp_path: Path) -> None:
    embedder = Lengths()
    cached = CachedEmbedder(embedder, tmp_path)
    first = cached.embed(["a", "ab", "a", "中文"])
    assert embedder.asked == ["a", "ab", "中文"]
    assert (first == Lengths().embed(["a", "ab", "a", "中文"])).all()
    later = Lengths()
    assert (CachedEmbedder(later, tmp_path).embed(["中文", "ab"]) == first[[3, 1]]).all()
    assert later.asked == []
    other = Lengths("other")
    CachedEmbedder(other, tmp_path).embed(["a"])
    assert other.asked == ["a"]


def test_the_file_has_keys_and_vectors(tmp_path: Path) -> None:
    CachedEmbedder(Lengths(), tmp_path).embed(["a", "b"])
    (path,) = files(tmp_path)
    found = load_file(path)
    assert found["keys"].tobytes() == text_digest("a") + text_digest("b")
    assert found["vectors"].shape == (2, 3)
    assert isinstance(open_vectors(path, "lengths").vectors_ND, np.memmap)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_the_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:20] = b"x" * 12
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit, empty, spoil_the_header])
def test_a_damaged_file_is_said_and_computed_again(tmp_path: Path, spoil: object) -> None:
    expected = CachedEmbedder(Lengths(), tmp_path).embed(["a", "ab"])
    (path,) = files(tmp_path)
    spoil(path)  # type: ignore[operator]
    told: list[str] = []
    embedder = Lengths()
    assert (CachedEmbedder(embedder, tmp_path, told.append).embed(["a", "ab"]) == expected).all()
    assert embedder.asked == ["a", "ab"]
    assert len(told) == 1
    assert f"{path} is damaged" in told[0]
    assert CachedEmbedder(again := Lengths(), tmp_path, told.append).embed(["a"]).any()
    assert (again.asked, len(told)) == ([], 1)


def test_many_files_are_merged(tmp_path: Path) -> None:
    cached = CachedEmbedder(Lengths(), tmp_path)
    reader = CachedEmbedder(Lengths(), tmp_path)
    for number in range(40):
        cached.embed(["b" * number])
        if number == 10:
            reader.embed(["b" * 3])
    assert len(files(tmp_path)) < 32
    later = Lengths()
    texts = ["b" * number for number in range(40)]
    assert (CachedEmbedder(later, tmp_path).embed(texts) == Lengths().embed(texts)).all()
    assert later.asked == []
    # A reader that mapped the files before they were merged and removed.
    assert (reader.embed(texts) == Lengths().embed(texts)).all()


def test_the_first_vector_of_a_text_stays(tmp_path: Path) -> None:
    """Two processes may compute the same text, with other last bits."""
    folder = tmp_path / "vectors"
    cached = CachedEmbedder(Lengths(), folder)
    first = cached.embed(["a"])
    write_vectors(files(folder)[0].with_name("0.safetensors"), "lengths", [text_digest("a")], first + np.float32(1e-7))
    assert (cached.embed(["a"]) == first).all()


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told: list[str] = []
    cached = CachedEmbedder(Lengths(), tmp_path / "file", told.append)
    assert (cached.embed(["a", "b"]) == Lengths().embed(["a", "b"])).all()
    assert cached.embed(["c"]).any()
    assert len(told) == 1
    assert told[0].startswith("vectors are not kept: ")


def test_a_file_that_another_process_merges_at_once_loses_no_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written_and_merged(path: Path, name: str, keys: Sequence[bytes], vectors_ND: Vectors) -> None:
        write_vectors(path, name, keys, vectors_ND)
        path.unlink()

    monkeypatch.setattr("selfeval.quality.embeddings.cache.write_vectors", written_and_merged)
    texts = ["a", "ab", "b"]
    assert (CachedEmbedder(Lengths(), tmp_path, group=1).embed(texts) == Lengths().embed(texts)).all()


def test_a_file_that_cannot_be_read_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = CachedEmbedder(Lengths(), tmp_path).embed(["a"])
    (path,) = files(tmp_path)

    def refused(opened: Path, name: str) -> object:
        if opened == path:
            raise OSError(24, "Too many open files")
        return open_vectors(opened, name)

    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("selfeval.quality.embeddings.cache.open_vectors", refused)
        cached = CachedEmbedder(Lengths(), tmp_path, told.append)
        assert (cached.embed(["a"]) == expected).all()
        cached.embed(["b"])
    assert len(told) == 1
    assert f"{path} cannot be read" in told[0]
    assert path.is_file()


def test_a_full_disk_ends_no_merge_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, name: str, keys: Sequence[bytes], vectors_ND: Vectors) -> None:
        if len(keys) > 1:
            raise StorageError("no space left")
        write_vectors(path, name, keys, vectors_ND)

    monkeypatch.setattr("selfeval.quality.embeddings.cache.write_vectors", full)
    told: list[str] = []
    cached = CachedEmbedder(Lengths(), tmp_path, told.append, group=1)
    texts = ["a" * number for number in range(1, 41)]
    assert (cached.embed(texts) == Lengths().embed(texts)).all()
    assert (cached.embed(texts) == Lengths().embed(texts)).all()
    assert told == [f"the files in {cached.folder} are not merged: no space left"]
    assert len(files(tmp_path)) == 40


def test_a_lock_that_cannot_be_created_ends_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: FileLock, timeout: float) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refused)
    told: list[str] = []
    texts = ["a" * number for number in range(1, 41)]
    found = CachedEmbedder(Lengths(), tmp_path, told.append, group=1).embed(texts)
    assert (found == Lengths().embed(texts)).all()
    assert len(told) == 1
    assert "Permission denied" in told[0]


def test_blank_texts_are_neither_embedded_nor_kept(tmp_path: Path) -> None:
    cached = CachedEmbedder(embedder := Lengths(), tmp_path, group=1)
    assert cached.embed([" ", "a", ""]).tolist()[::2] == [[0, 0, 0]] * 2
    assert embedder.asked == ["a"]
    assert len(files(tmp_path)) == 1
    assert CachedEmbedder(Lengths(), tmp_path).embed(["", "\n"]).shape == (2, 3)


def test_vectors_of_another_width_than_the_kept_ones_are_refused(tmp_path: Path) -> None:
    class Narrow(Lengths):
        def embed(self, texts: Sequence[str]) -> Vectors:
            return super().embed(texts)[:, :2]

    expected = CachedEmbedder(Lengths(), tmp_path).embed(["a"])
    with pytest.raises(EndpointError, match=r"vectors with 2 dimensions, but those in .* have 3; remove this folder"):
        CachedEmbedder(Narrow(), tmp_path).embed(["a", "b"])
    assert (CachedEmbedder(Lengths(), tmp_path).embed(["a"]) == expected).all()


def test_vectors_are_kept_after_each_group(tmp_path: Path) -> None:
    class Failing(Lengths):
        def embed(self, texts: Sequence[str]) -> Vectors:
            if "c" in texts:
                raise EndpointError("the server refuses")
            return super().embed(texts)

    with pytest.raises(EndpointError):
        CachedEmbedder(Failing(), tmp_path, group=2).embed(["a", "b", "c", "d"])
    later = Lengths()
    CachedEmbedder(later, tmp_path).embed(["a", "b", "c", "d"])
    assert later.asked == ["c", "d"]


PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_cache import Lengths
from selfeval.quality.embeddings.cache import CachedEmbedder
cached = CachedEmbedder(Lengths(), Path({folder!r}), lambda message: sys.exit(message))
for number in range(60):
    cached.embed(["a" * (number % 50), "b" * int(sys.argv[1]) + "a" * number])
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    code = PROCESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    running = [Popen([sys.executable, "-c", code, str(number)]) for number in (1, 2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    told: list[str] = []
    embedder = Lengths()
    texts = [f"{'b' * number}{'a' * count}" for number in (1, 2) for count in range(60)]
    assert (CachedEmbedder(embedder, tmp_path, told.append).embed(texts) == Lengths().embed(texts)).all()
    assert (embedder.asked, told) == ([], [])
