"""Small PDF files, written by hand after ISO 32000-1, so that reading them does not rely on the library that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["pdf"]


def pdf(pages: Sequence[Sequence[str]], to_unicode: Mapping[str, str] | None = None) -> bytes:
    """Return a PDF file.

    Args:
        pages: lines of each page, in ASCII; an empty line leaves a gap.
        to_unicode: for characters, the hexadecimal UTF-16 to which the font maps them. Default: none.
    """
    last = 4 + 2 * len(pages)
    mapped = f"/ToUnicode {last} 0 R " if to_unicode else ""
    font = f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica {mapped}>>".encode()
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        font,
    ]
    for number, lines in enumerate(pages):
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {5 + 2 * number} 0 R "
        objects.append(f"{page}/Resources << /Font << /F1 3 0 R >> >> >>".encode())
        shown = "".join(f"({_escaped(line)}) Tj T*\n" for line in lines)
        text = f"BT /F1 12 Tf 14 TL 50 750 Td\n{shown}ET".encode("ascii")
        objects.append(_stream(text))
    return _file([*objects, _stream(_map(to_unicode))] if to_unicode else objects)


def _stream(content: bytes) -> bytes:
    return b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content)


def _map(to_unicode: Mapping[str, str]) -> bytes:
    """Return a CMap (ISO 32000-1, 9.10.3)."""
    lines = "".join(f"<{ord(char):02X}> <{code}>\n" for char, code in to_unicode.items())
    return f"1 begincodespacerange\n<00> <FF>\nendcodespacerange\n{len(to_unicode)} beginbfchar\n{lines}endbfchar".encode()


def _escaped(line: str) -> str:
    return line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def _file(objects: Sequence[bytes]) -> bytes:
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    return data + head + table + tail
