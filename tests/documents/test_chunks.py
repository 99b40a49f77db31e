from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfeval.documents.blocks import Block, Document
from selfeval.documents.chunks import Chunk, chunks_of
from selfeval.documents.sentences import sentences


def words(text: str) -> int:
    return len(text.split())


def document(*blocks: Block) -> Document:
    return Document("a.md", "lines", blocks)


def paragraph(text: str, first: int = 1) -> Block:
    return Block(text, first, first + text.count("\n"))


# -- every document ------------------------------------------------------------------------------------------------------

ALPHABET = st.sampled_from([*"abcAB .,!?\n\n-|1", "。", "，", "押", "金", "é", "👍"])
BLOCKS = st.builds(
    lambda text, level: Block(text, 1, 1 + text.count("\n"), level),
    st.text(ALPHABET, min_size=1, max_size=120).map(str.strip).filter(bool),
    st.sampled_from([0, 0, 0, 1, 2, 3]),
)
COUNTS: list[Callable[[str], int]] = [len, words, lambda text: len(text.encode()) // 2]


def plain(texts: list[str]) -> str:
    return "".join("".join(texts).split())


@given(st.lists(BLOCKS, max_size=8), st.integers(8, 60), st.sampled_from(COUNTS))
def test_no_text_is_lost_repeated_or_moved_and_no_passage_is_over_the_limit(
    blocks: list[Block], limit: int, count: Callable[[str], int]
) -> None:
    found = chunks_of(document(*blocks), limit, count)
    assert plain([chunk.text for chunk in found]) == plain([block.text for block in blocks if not block.level])
    assert all(count(chunk.passage) <= limit for chunk in found)
    assert all(chunk.text == chunk.text.strip() != "" for chunk in found)


@given(st.text(ALPHABET, max_size=200))
def test_sentences_are_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text


@given(st.lists(st.sampled_from(["A bike is here. ", "Is it? ", "Stop! ", "押金二十元。", "几点开门？"]), max_size=30))
def test_a_sentence_that_fits_is_never_cut(parts: list[str]) -> None:
    text = "".join(parts).strip()
    if not text:
        return
    found = chunks_of(document(paragraph(text)), 20, len)
    assert [s.strip() for chunk in found for s in sentences(chunk.text)] == [part.strip() for part in parts]


# -- sections ------------------------------------------------------------------------------------------------------------


def test_a_chunk_has_the_titles_of_its_sections_and_never_crosses_one() -> None:
    blocks = [
        Block("Prices", 1, 1, 1),
        paragraph("All in euros.", 3),
        Block("Bikes", 5, 5, 2),
        paragraph("A bike is 3.", 7),
        paragraph("A day is 12.", 9),
        Block("Empty", 11, 11, 2),
        Block("Help", 13, 13, 1),
        paragraph("Call us.", 15),
    ]
    found = chunks_of(document(*blocks), 100, words)
    assert found == [
        Chunk("All in euros.", ("Prices",), "a.md", "lines", 3, 3),
        Chunk("A bike is 3.\n\nA day is 12.", ("Prices", "Bikes"), "a.md", "lines", 7, 9),
        Chunk("Call us.", ("Help",), "a.md", "lines", 15, 15),
    ]
    assert found[1].passage == "Prices > Bikes\n\nA bike is 3.\n\nA day is 12."
    assert found[1].source == {"file": "a.md", "headings": ["Prices", "Bikes"], "lines": [7, 9]}


def test_titles_take_at_most_half_of_the_limit() -> None:
    blocks = [Block("one two three four", 1, 1, 1), Block("five six", 2, 2, 2), paragraph("seven eight nine", 3)]
    [chunk] = chunks_of(document(*blocks), 6, words)
    assert chunk.headings == ("five six",)


def test_paragraphs_are_packed_up_to_the_limit() -> None:
    blocks = [paragraph("one two three", 1), paragraph("four five", 3), paragraph("six seven", 5)]
    assert [chunk.text for chunk in chunks_of(document(*blocks), 5, words)] == ["one two three\n\nfour five", "six seven"]


def test_a_long_paragraph_is_split_between_sentences_with_their_lines() -> None:
    block = paragraph("One two three.\nFour five six. Seven\neight nine. Ten eleven.", 4)
    found = chunks_of(document(block), 6, words)
    assert [(chunk.text, chunk.first, chunk.last) for chunk in found] == [
        ("One two three.\nFour five six.", 4, 5),
        ("Seven\neight nine. Ten eleven.", 5, 6),
    ]


def test_a_sentence_over_the_limit_is_cut_at_a_space_or_a_comma() -> None:
    assert [chunk.text for chunk in chunks_of(document(paragraph("alpha beta gamma delta")), 12, len)] == [
        "alpha beta",
        "gamma delta",
    ]
    chinese = paragraph("城市自行车前三十分钟收费一元，之后每十五分钟收费五角")
    assert [chunk.text for chunk in chunks_of(document(chinese), 16, len)] == [
        "城市自行车前三十分钟收费一元，",
        "之后每十五分钟收费五角",
    ]


def test_a_sentence_over_the_limit_is_cut_at_a_line_break_if_one_is_near_the_end() -> None:
    table = paragraph("alpha 3\nbeta 4 gamma 5\ndelta 6 and more", 2)
    found = chunks_of(document(table), 26, len)
    assert [(chunk.text, chunk.first, chunk.last) for chunk in found] == [
        ("alpha 3\nbeta 4 gamma 5", 2, 3),
        ("delta 6 and more", 4, 4),
    ]


def test_the_time_of_a_long_table_is_linear_in_its_length() -> None:
    def counted(lines: int) -> int:
        seen = 0

        def count(text: str) -> int:
            nonlocal seen
            seen += len(text)
            return len(text) // 4

        chunks_of(document(paragraph("\n".join(f"part {n:06} costs {n % 90}, in stock" for n in range(lines)))), 256, count)
        return seen

    assert counted(4000) < 2.2 * counted(2000)


def test_a_limit_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        chunks_of(document(paragraph("One.")), 0, words)


# -- sentences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        ["The fee is 2.50 euros. ", "Pay at once!"],
        ["Ask Dr. Smith, e.g. on Monday. ", "It is free."],
        ['She said "stop." ', "Then she left."],
        ["Version 2. is here and v. 3 too."],
        ["押金二十元。", "多久退还？", "三天内！”", "他说。"],
        ["See the list:\n", "- a bike\n", "- a helmet"],
        ["First.\n\n", "Second."],
        ["Is it open? ", "(Yes.)"],
    ],
)
def test_sentence_ends(parts: list[str]) -> None:
    assert sentences("".join(parts)) == parts
