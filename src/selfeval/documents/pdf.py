"""Blocks of PDF files, by pypdf (extra `data`): paragraphs, with the pages that they are on.

A PDF has no paragraphs, only lines at places on a page: lines are joined, and a blank line ends a paragraph. A paragraph that
does not end with the end of a sentence is continued by the next page. Headings cannot be told from other lines.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable

from selfeval.documents.blocks import Block
from selfeval.documents.plain_text import text_blocks
from selfeval.errors import DataError, MissingPackageError

__all__ = ["pdf_blocks"]

_LONGEST = 1 << 24
"""Maximum number of characters: a small file can unpack to any length."""
_ENDED = re.compile(r"[.!?:。！？：…][\"'”’)\]）】」』]*\Z")
_UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")


def pdf_blocks(data: bytes) -> list[Block]:
    """Return the paragraphs of a PDF file.

    Raises:
        DataError: it is encrypted, damaged or too large.
        MissingPackageError: pypdf is not installed.
    """
    return joined(enumerate(_pages(data), start=1))


def _pages(data: bytes) -> list[str]:
    """Return the text of each page."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError
    except ImportError as error:
        raise MissingPackageError("reading PDF files", "pypdf", extra="data") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns about every repaired object
    try:
        reader = PdfReader(io.BytesIO(data))
        # An empty password opens files that only restrict printing or copying.
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError("is encrypted; save it without a password")
        return _within_limit(_valid(page.extract_text()) for page in reader.pages)
    except DataError:
        raise
    except DependencyError as error:
        raise DataError(
            f"needs another package ({error}); install pypdf[crypto] if it is encrypted, or save it without a password"
        ) from error
    except RecursionError as error:
        raise DataError("is damaged (nested too deeply)") from error
    except Exception as error:  # the parser raises whatever a damaged file leads to
        raise DataError(f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from error


def _within_limit(texts: Iterable[str]) -> list[str]:
    """Return the texts, or stop at the first one that makes them too long."""
    found: list[str] = []
    length = 0
    for text in texts:
        length += len(text)
        if length > _LONGEST:
            raise DataError(f"is too large: it has over {_LONGEST} characters of text; split it")
        found.append(text)
    return found


def _valid(text: str) -> str:
    """Join surrogate pairs, replace lone surrogates and remove NUL: a font may map to them, and no tokenizer takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")


def joined(pages: Iterable[tuple[int, str]]) -> list[Block]:
    """Return the paragraphs of numbered pages; a paragraph that a page break interrupts is one block.

    Example:
        >>> joined([(1, "A bike costs"), (2, "3 euros.\\n\\nBring it back.")])
        [Block(text='A bike costs 3 euros.', first=1, last=2, level=0), Block(text='Bring it back.', first=2, last=2, level=0)]
    """
    blocks: list[Block] = []
    for number, page in pages:
        for place, paragraph in enumerate(text_blocks(page.replace("\r\n", "\n").replace("\r", "\n"))):
            text = _unbroken(paragraph.text.split("\n"))
            if place == 0 and blocks and blocks[-1].last < number and not _ENDED.search(blocks[-1].text):
                text = _unbroken([blocks[-1].text, text])
                blocks[-1] = Block(text, blocks[-1].first, number)
            else:
                blocks.append(Block(text, number, number))
    return blocks


def _unbroken(lines: list[str]) -> str:
    """Join the lines of a paragraph: by a space, except between Chinese or Japanese characters."""
    text = ""
    for line in (" ".join(line.split()) for line in lines):
        together = bool(text and line and _UNSPACED.match(text[-1]) and _UNSPACED.match(line[0]))
        text += line if together or not text else f" {line}"
    return text
