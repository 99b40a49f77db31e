"""The blocks of Markdown, HTML and PDF files."""

from __future__ import annotations

import io
from importlib.util import find_spec

import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from documents.pdf_files import pdf
from selfeval.documents.blocks import Block
from selfeval.documents.html import html_blocks
from selfeval.documents.markdown import markdown_blocks
from selfeval.documents.pdf import joined, pdf_blocks
from selfeval.documents.plain_text import text_blocks
from selfeval.errors import DataError

MARKDOWN = """---
title: Rent
---
# Rent a *bike*

A bike costs
3 euros.

Prices
------

| bike | price |
|---|---|
| city | 3 |

<!-- a note to the editor -->

```
# not a heading
code
```

1. one

   more of it
2. two
"""


def test_markdown_keeps_its_blocks_with_their_lines() -> None:
    assert markdown_blocks(MARKDOWN) == [
        Block("Rent a *bike*", 4, 4, 1),
        Block("A bike costs\n3 euros.", 6, 7),
        Block("Prices", 9, 10, 2),
        Block("| bike | price |\n|---|---|\n| city | 3 |", 12, 14),
        Block("```\n# not a heading\ncode\n```", 18, 21),
        Block("1. one\n\n   more of it\n2. two", 23, 26),
    ]


@given(st.lists(st.sampled_from(["Words here.", "- an item", "> a quote", "1. one", "", "", "    code", "***"]), max_size=20))
def test_no_line_of_markdown_is_lost(lines: list[str]) -> None:
    found = "".join(block.text for block in markdown_blocks("\n".join(lines)))
    assert "".join(found.split()) == "".join("".join(line for line in lines if line != "***").split())


HTML = """<!DOCTYPE html><html><head><title>No</title><style>p { }</style></head><body>
<nav><a href="x">Menu</a></nav>
<h1>Rent &amp; return</h1>
<p>A <b>city</b> bike costs&nbsp;3
euros.<br>Each day.</p>
<script>if (a < b) document.write("<p>no</p>")</script>
<ul><li>a helmet<li>a lock</ul>
<table><tr><th>bike</th><th>price</th></tr><tr><td>city</td><td>3</td></tr></table>
<pre>x = 1
  y</pre>
loose text
</body></html>"""


def test_html_has_the_text_that_a_reader_sees() -> None:
    assert html_blocks(HTML) == [
        Block("Rent & return", 3, 3, 1),
        Block("A city bike costs 3 euros.\nEach day.", 4, 5),
        Block("- a helmet", 7, 7),
        Block("- a lock", 7, 7),
        Block("bike | price", 8, 8),
        Block("city | 3", 8, 8),
        Block("x = 1\n  y", 9, 10),
        Block("loose text", 11, 11),
    ]


@pytest.mark.parametrize(
    ("page", "texts"),
    [
        ("<head><title>No</title><meta charset=utf-8><body><p>a</p>", ["a"]),
        ("<head><title>No</title><p>a</p><p>b</p>", ["a", "b"]),
        ("<p>a</p><noscript><iframe src=x></noscript><p>b</p>", ["a", "b"]),
        ("<nav><select><option>No</nav><p>b</p>", ["b"]),
        ("<nav>No<nav>No</nav>No</nav><p>b</p>", ["b"]),
        ("<button>a<p>b</p>", ["a", "b"]),
    ],
)
def test_elements_that_are_not_closed_do_not_hide_the_rest_of_a_page(page: str, texts: list[str]) -> None:
    assert [block.text for block in html_blocks(page)] == texts


def test_the_mark_of_an_item_is_before_its_first_text() -> None:
    page = (
        "<ul><li><p>one</p><p>more</p></li><li>\n<div>two</div></li><li></li></ul><p>text</p><ul><li><h2>Title</h2>three</ul>"
    )
    assert [block.text for block in html_blocks(page)] == ["- one", "more", "- two", "text", "Title", "three"]


@given(st.lists(st.sampled_from([*"ab <>/&;!-\n", "<p>", "</p>", "<script>", "</script>", "<!--", "-->", "<h2>"]), max_size=60))
def test_any_html_can_be_read(parts: list[str]) -> None:
    blocks = html_blocks("".join(parts))
    assert all(block.text.strip() and 1 <= block.first <= block.last for block in blocks)


def test_the_lines_of_text() -> None:
    assert text_blocks("\n a\nb \n\n\n c\n") == [Block("a\nb", 2, 3), Block("c", 6, 6)]


# -- PDF -----------------------------------------------------------------------------------------------------------------


def test_a_paragraph_that_a_page_break_interrupts_is_one_block() -> None:
    assert joined([(1, "Bring the bike"), (2, "back by six.\n\nThe fee"), (3, "is 3."), (4, "New.")]) == [
        Block("Bring the bike back by six.", 1, 2),
        Block("The fee is 3.", 2, 3),
        Block("New.", 4, 4),
    ]


def test_lines_of_chinese_are_joined_without_a_space() -> None:
    assert joined([(1, "押金是二\n十元。"), (2, "使用 app\n退还")]) == [
        Block("押金是二十元。", 1, 1),
        Block("使用 app 退还", 2, 2),
    ]


def test_the_text_of_a_pdf_file() -> None:
    found = pdf_blocks(pdf([["A bike costs (for a day)", "12 euros."], ["Bring it back."]]))
    assert found == [Block("A bike costs (for a day) 12 euros.", 1, 1), Block("Bring it back.", 2, 2)]


def encrypted(password: str) -> bytes:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([["A secret."]])))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    data = io.BytesIO()
    writer.write(data)
    return data.getvalue()


def test_an_encrypted_pdf_is_refused_unless_its_password_is_empty() -> None:
    with pytest.raises(DataError, match="is encrypted; save it without a password"):
        pdf_blocks(encrypted("open sesame"))
    assert pdf_blocks(encrypted("")) == [Block("A secret.", 1, 1)]


def test_a_pdf_that_needs_another_package_names_it() -> None:
    encryption = (
        f"<< /Filter /Standard /V 5 /R 6 /Length 256 /P -4 /O <{'00' * 48}> /U <{'00' * 48}> /OE <{'00' * 32}> "
        f"/UE <{'00' * 32}> /Perms <{'00' * 16}> "
        f"/CF << /StdCF << /CFM /AESV3 /Length 32 /AuthEvent /DocOpen >> >> /StmF /StdCF /StrF /StdCF >>"
    )
    aes = pdf([["A secret."]]).replace(b"/Root 1 0 R", f"/Root 1 0 R /ID [<00> <00>] /Encrypt {encryption}".encode())
    # Where the package is installed, the method is known and the password is wrong.
    has_aes = any(find_spec(name) for name in ("cryptography", "Crypto"))
    expected = (
        "is encrypted; save it without a password" if has_aes else r"needs another package .*AES.* install pypdf\[crypto\]"
    )
    with pytest.raises(DataError, match=expected):
        pdf_blocks(aes)


def test_characters_that_no_tokenizer_takes_are_replaced() -> None:
    # The font maps A to a lone surrogate, B to NUL, C and D to the two surrogates of a thumb.
    found = pdf_blocks(pdf([["xAyBz CD"]], to_unicode={"A": "D83D", "B": "0000", "C": "D83D", "D": "DC4D"}))
    assert [block.text for block in found] == ["x\ufffdyz \U0001f44d"]


def test_a_pdf_with_too_much_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfeval.documents.pdf._LONGEST", 30)
    assert pdf_blocks(pdf([["A bike costs 3."], ["Two cost 6."]]))
    with pytest.raises(DataError, match="is too large: it has over 30 characters of text"):
        pdf_blocks(pdf([["A bike costs 3."], ["Two bikes cost 6."]]))


@pytest.mark.parametrize("cut", [0.05, 0.5])
def test_a_damaged_pdf_is_refused(cut: float) -> None:
    whole = pdf([["A bike costs 12 euros."]])
    with pytest.raises(DataError, match="is damaged"):
        pdf_blocks(whole[: int(len(whole) * cut)])
