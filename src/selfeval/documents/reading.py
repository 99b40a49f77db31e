"""Find and read documents: text, Markdown, HTML and PDF files. A file that cannot be read is skipped, with the reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfeval.documents.blocks import Block, Document, Unit
from selfeval.documents.html import html_blocks
from selfeval.documents.markdown import markdown_blocks
from selfeval.documents.pdf import pdf_blocks
from selfeval.documents.plain_text import text_blocks
from selfeval.errors import DataError, InputError
from selfeval.texts import read_bytes, read_text, visible

__all__ = ["SUFFIXES", "Read", "Skipped", "read_documents"]

_LARGEST = 64 << 20
_REMEDY = "pass text, Markdown, HTML or PDF files"


@dataclass(frozen=True)
class Skipped:
    """A file that was not used.

    Attributes:
        file: its name, as a document would be named.
        reason: why.
    """

    file: str
    reason: str


@dataclass(frozen=True)
class Read:
    """Documents that were read, in the order of their paths, and files that were skipped."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def _from_text(blocks: Callable[[str], list[Block]]) -> Callable[[Path], list[Block]]:
    def read(path: Path) -> list[Block]:
        text = read_text(path, "document", DataError, most=_LARGEST, remedy=_REMEDY)
        if "\0" in text:
            raise DataError(f"document {path} is binary: it contains NUL at character {text.index(chr(0))}")
        return blocks(text)

    return read


def _pdf(path: Path) -> list[Block]:
    data = read_bytes(path, "document", DataError, _LARGEST, _REMEDY)
    try:
        return pdf_blocks(data) if data else []
    except DataError as problem:
        raise DataError(f"document {path} {problem}") from problem


_READERS: dict[str, Callable[[Path], list[Block]]] = {
    **dict.fromkeys((".txt", ".text"), _from_text(text_blocks)),
    **dict.fromkeys((".md", ".markdown"), _from_text(markdown_blocks)),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _from_text(html_blocks)),
    ".pdf": _pdf,
}
SUFFIXES = tuple(_READERS)
"""Endings of the names of documents, in lower case."""


def read_documents(paths: Sequence[Path]) -> Read:
    """Read files, and all documents in folders.

    In folders, hidden files and folders are ignored, and symbolic links are skipped: they could lead out of the folder or in a
    circle. A link that is named directly is followed.

    Args:
        paths: files and folders.

    Raises:
        InputError: a path does not exist, or a folder cannot be read.
        DataError: no document has any text; the message has the reasons.
        MissingPackageError: there is a PDF file, and pypdf is not installed.
    """
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for name, path, is_found in _named(_files(paths)):
        try:
            if is_found and path.is_symlink():
                raise DataError(f"document {path} is a symbolic link; pass it as an argument to follow it")
            documents.append(_read(name, path))
        except DataError as problem:
            skipped.append(Skipped(name, visible(str(problem))))
    if not documents:
        raise DataError(_nothing(paths, skipped))
    return Read(tuple(documents), tuple(skipped))


def _nothing(paths: Sequence[Path], skipped: Sequence[Skipped]) -> str:
    where = ", ".join(visible(str(path)) for path in paths)
    reasons = "; ".join(skip.reason for skip in skipped[:3]) or "there are no files"
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"no document with text in {where}: {reasons}{more}"


def _read(name: str, path: Path) -> Document:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"{path} is not a document: its name does not end in {', '.join(SUFFIXES)}")
    blocks = _READERS[suffix](path)
    unit: Unit = "pages" if suffix == ".pdf" else "lines"
    if all(block.level for block in blocks):
        scanned = "; a scanned document needs OCR first" if suffix == ".pdf" else ""
        raise DataError(f"document {path} has no text{scanned}")
    return Document(name, unit, tuple(blocks))


def _named(files: Iterable[tuple[str, Path, bool]]) -> list[tuple[str, Path, bool]]:
    """Return the files with distinct names: those of the same name are named by their paths, with the folder passed."""
    found = list(files)
    while True:
        count = Counter(name for name, _, _ in found)
        # A path may be the name of a further file, so the new names are compared again.
        named = [(path.as_posix() if count[name] > 1 else name, path, is_found) for name, path, is_found in found]
        if named == found:
            return found
        found = named


def _files(paths: Sequence[Path]) -> Iterator[tuple[str, Path, bool]]:
    """Yield name and path of each file once, and whether it was found in a folder.

    The order is that of the paths, and of the names in a folder.
    """
    known: set[str] = set()
    for path in paths:
        if not path.exists():
            why = "is a broken symbolic link" if path.is_symlink() else "does not exist"
            raise InputError(f"{visible(str(path))} {why}; {_REMEDY}, or folders of them")
        is_folder = path.is_dir()
        for name, file in _in_folder(path) if is_folder else [(path.name, path)]:
            whole = os.path.abspath(file) if file.is_symlink() else os.path.realpath(file)
            if whole not in known:
                known.add(whole)
                yield name, file, is_folder


def _in_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a folder and its subfolders, sorted, and linked folders; without hidden ones."""

    def refused(problem: OSError) -> None:
        raise InputError(f"folder {visible(str(problem.filename))} cannot be read: {problem.strerror}") from problem

    for root, folders, files in os.walk(folder, onerror=refused):
        seen = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in seen if Path(root, name).is_symlink()]
        folders[:] = [name for name in seen if name not in linked]  # in place: `os.walk` descends in this order
        for name in sorted([*files, *linked]):
            if not name.startswith("."):
                path = Path(root, name)
                yield path.relative_to(folder).as_posix(), path
