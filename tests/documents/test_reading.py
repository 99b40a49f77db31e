from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from documents.pdf_files import pdf
from selfeval.documents.reading import read_documents
from selfeval.errors import DataError, InputError, MissingPackageError


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.TXT", "a/y.html", ".hidden.md", ".git/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<p>Text of {name}.</p>")
    read = read_documents([tmp_path, tmp_path / "b.md"])
    assert [document.name for document in read.documents] == ["b.md", "a/y.html", "a/z.TXT"]
    assert read.skipped == ()
    assert read.documents[1].blocks[0].text == "Text of a/y.html."


def test_files_that_cannot_be_read_are_skipped_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "good.md").write_bytes("\ufeff押金二十元。\r\n".encode())
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.md").write_bytes(b" \n")
    (tmp_path / "title.md").write_text("# Only a title\n")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    (tmp_path / "link.md").symlink_to(tmp_path / "good.md")
    (tmp_path / "links").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    read = read_documents([tmp_path])
    [document] = read.documents
    assert (document.name, document.blocks[0].text) == ("good.md", "押金二十元。")
    reasons = {skip.file: skip.reason for skip in read.skipped}
    assert sorted(reasons) == sorted(set(os.listdir(tmp_path)) - {"good.md"})
    assert "byte 0xe9 in position 3" in reasons["latin.txt"]
    assert "latin.txt is not UTF-8" in reasons["latin.txt"]
    assert "binary.txt is binary: it contains NUL at character 1" in reasons["binary.txt"]
    assert "has no text" in reasons["empty.md"]
    assert "has no text" in reasons["title.md"]
    assert "photo.png is not a document: its name does not end in .txt" in reasons["photo.png"]
    assert "is a symbolic link" in reasons["link.md"]
    assert "is a symbolic link" in reasons["links"]
    assert "is a named pipe or a device" in reasons["pipe.txt"]


def test_documents_of_the_same_name_are_named_with_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bikes/index.md", "bikes/fees.md", "help/index.md", "more/help/index.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"Text of {name}.")
    read = read_documents([Path("bikes"), Path("help"), Path("more")])
    # help/index.md of the folder more has the name that another document gets, and so its folder too.
    assert {document.name: document.blocks[0].text for document in read.documents} == {
        "fees.md": "Text of bikes/fees.md.",
        "bikes/index.md": "Text of bikes/index.md.",
        "help/index.md": "Text of help/index.md.",
        "more/help/index.md": "Text of more/help/index.md.",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Text.")
    (tmp_path / "b.md").write_text("Text.")
    (tmp_path / "b.md").chmod(0)
    assert "permission denied" in read_documents([tmp_path]).skipped[0].reason


def test_a_link_that_is_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.md").write_text("Text.")
    (tmp_path / "link.md").symlink_to(tmp_path / "real.md")
    assert [document.name for document in read_documents([tmp_path / "link.md"]).documents] == ["link.md"]


def test_pdf_files_are_skipped_for_the_same_reasons(tmp_path: Path) -> None:
    (tmp_path / "good.pdf").write_bytes(pdf([["Text."]]))
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 nothing")
    (tmp_path / "empty.pdf").write_bytes(b"")
    (tmp_path / "scan.pdf").write_bytes(pdf([[]]))
    read = read_documents([tmp_path])
    assert [(document.name, document.unit) for document in read.documents] == [("good.pdf", "pages")]
    reasons = {skip.file: skip.reason for skip in read.skipped}
    assert "bad.pdf is damaged" in reasons["bad.pdf"]
    assert "scan.pdf has no text; a scanned document needs OCR first" in reasons["scan.pdf"]
    assert "empty.pdf has no text" in reasons["empty.pdf"]


def test_without_pypdf_a_pdf_file_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(MissingPackageError, match=r"reading PDF files needs the package pypdf.*self-evaluator\[data\]"):
        read_documents([tmp_path])


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "empty.md").write_bytes(b"")
    with pytest.raises(DataError, match=r"no document with text in .*empty\.md has no text"):
        read_documents([tmp_path])
    (tmp_path / "empty.md").unlink()
    with pytest.raises(DataError, match="there are no files"):
        read_documents([tmp_path])


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist; pass text, Markdown, HTML or PDF files, or folders of them"):
        read_documents([tmp_path / "nowhere"])
