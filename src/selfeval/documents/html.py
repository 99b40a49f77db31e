"""Blocks of HTML, by the parser of the standard library: headings, paragraphs, list items and rows of tables.

Scripts, styles and the navigation of a page are left out. A page that scripts fill has no text.
"""

from __future__ import annotations

from html.parser import HTMLParser

from selfeval.documents.blocks import Block

__all__ = ["html_blocks"]

_HEADINGS = {f"h{level}": level for level in range(1, 7)}
_IN_HEAD = {"title", "meta", "link", "base", "script", "style", "template", "noscript"}
_SKIPPED = {"script", "style", "template", "noscript", "head", "title", "nav", "svg", "select", "iframe", "object"}
_INLINE = {
    *("a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img", "ins", "kbd", "label"),
    *("mark", "q", "ruby", "rp", "rt", "s", "samp", "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"),
}
_CELLS = ("td", "th")


def html_blocks(text: str) -> list[Block]:
    """Return the blocks of an HTML page.

    Example:
        >>> html_blocks("<h1>Rent</h1><p>A <b>bike</b> costs\\n3 euros.</p>")
        [Block(text='Rent', first=1, last=1, level=1), Block(text='A bike costs 3 euros.', first=1, last=2, level=0)]
    """
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.finish()


class _Reader(HTMLParser):
    """Collects text until a tag that is not inline begins or ends."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._parts: list[str] = []
        self._first, self._last = 0, 0
        self._level = 0
        self._skipped: list[str] = []
        self._mark = ""
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # The first element of the body ends a head that is not closed, as in a browser.
        if tag == "body" or (self._skipped == ["head"] and tag not in _IN_HEAD):
            self._skipped.clear()
        if self._skipped:
            self._skipped += [tag] if tag in _SKIPPED else []
        elif tag in _SKIPPED:
            self._end_block()
            self._skipped.append(tag)
        elif tag == "br":
            self._parts.append("\n")
        elif tag not in _INLINE and not (tag in _CELLS and self._parts):
            self._end_block()
            self._level = _HEADINGS.get(tag, 0)
            self._verbatim += tag == "pre"
            self._mark = "- " if tag == "li" else self._mark

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            # The end of an element ends all in it, of which some may never be closed.
            if tag in self._skipped:
                del self._skipped[len(self._skipped) - 1 - self._skipped[::-1].index(tag) :]
        elif tag in _CELLS:
            self._parts.append(" | ")
        elif tag not in _INLINE:
            self._end_block()
            self._verbatim = max(0, self._verbatim - (tag == "pre"))
            self._mark = "" if tag == "li" else self._mark

    def handle_data(self, data: str) -> None:
        if self._skipped or not data:
            return
        line = self.getpos()[0]
        if data.strip():
            lead = len(data) - len(data.lstrip())
            self._first = self._first or line + data[:lead].count("\n")
            self._last = line + data.rstrip().count("\n")
        self._parts.append(data if self._verbatim else _folded(data))

    def _end_block(self) -> None:
        text = "".join(self._parts)
        lines = [line.rstrip() if self._verbatim else " ".join(line.split()) for line in text.split("\n")]
        shown = "\n".join(line for line in lines if line.strip() or self._verbatim).strip("\n").removesuffix(" |").rstrip()
        if self._first and shown.strip():
            # The text of an item may be in a paragraph, so its mark waits for the first text.
            self.blocks.append(Block(shown if self._level else self._mark + shown, self._first, self._last, self._level))
            self._mark = ""
        self._parts, self._first, self._last, self._level = [], 0, 0, 0

    def finish(self) -> list[Block]:
        self._end_block()
        return self.blocks


def _folded(data: str) -> str:
    """Fold white space to single spaces, also at the ends, where it separates words from those in inline tags."""
    words = " ".join(data.split())
    if not words:
        return " "
    return f"{' ' if data[0].isspace() else ''}{words}{' ' if data[-1].isspace() else ''}"
