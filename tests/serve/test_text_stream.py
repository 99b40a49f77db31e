"""The text of a reply in pieces: whole characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfeval.serve.text_stream import GrowingText, TextStream


def decode(ids: Sequence[int]) -> str:
    """Tokens are bytes, as in a byte-level vocabulary at its worst."""
    return bytes(ids).decode("utf-8", errors="replace")


def streamed(data: bytes, stops: Sequence[str] = (), *, strip: bool = False, finished: bool = True) -> list[str]:
    """Return the pieces of a reply of which each byte is a token; as in the engine, a stop string ends it."""
    stream, ids, pieces = TextStream(decode, stops, strip=strip), [], []
    for byte in data:
        ids.append(byte)
        pieces.append(stream.piece(ids))
        if any(stop in decode(ids) for stop in stops):
            break
    return [*pieces, stream.rest(ids, finished=finished)]


def test_a_character_of_several_tokens_is_one_piece() -> None:
    assert [piece for piece in streamed("a😀é".encode()) if piece] == ["a", "😀", "é"]


def test_a_possible_stop_string_is_held_back_and_released() -> None:
    assert streamed(b"x EN EN1", ["END"]) == ["x", " ", "", "", "EN ", "", "", "EN1", ""]


def test_a_stop_string_is_not_part_of_the_text() -> None:
    assert "".join(streamed(b"one\nQ: two", ["\nQ:"])) == "one"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert "".join(streamed(b"abcdef", ["cd", "bcd"])) == "a"


def test_an_incomplete_character_is_dropped_at_the_limit_and_shown_at_the_end() -> None:
    cut = "aé".encode()[:-1]
    assert "".join(streamed(cut, finished=False)) == "a"
    assert "".join(streamed(cut, finished=True)) == "a\ufffd"


def test_white_space_around_the_reply_is_removed_and_that_inside_is_kept() -> None:
    pieces = streamed(b"  a \n b \n ", strip=True)
    assert "".join(pieces) == "a \n b"
    assert all(piece == "" or not piece.endswith((" ", "\n")) for piece in pieces)


@given(
    text=st.text(alphabet="ab \n😀é", max_size=12),
    stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=3),
    strip=st.booleans(),
)
def test_pieces_add_up_to_the_whole_and_contain_no_stop_string(text: str, stops: list[str], strip: bool) -> None:
    pieces = streamed(text.encode(), stops, strip=strip)
    # Slowly and independently: cut the text at the first stop string that was completed first.
    first = next((n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    whole = text if first is None else text[: min(text[:first].find(stop) for stop in stops if stop in text[:first])]
    assert "".join(pieces) == (whole.strip() if strip else whole)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("stops", [[], ["zz"]])
def test_what_was_sent_is_never_sent_again(stops: list[str]) -> None:
    assert "".join(streamed(b"abcabc", stops)) == "abcabc"


@given(text=st.text(alphabet="ab \n😀é", max_size=60), step=st.integers(1, 40))
def test_a_growing_text_is_that_of_all_tokens(text: str, step: int) -> None:
    data, growing = text.encode(), GrowingText(decode)
    for length in range(0, len(data) + 1, step):
        assert growing.of(data[:length]) == decode(data[:length])


def test_a_growing_text_decodes_a_few_tokens_at_a_time() -> None:
    decoded: list[int] = []
    growing = GrowingText(lambda ids: decoded.append(len(ids)) or decode(ids))  # type: ignore[func-returns-value]
    for length in range(1, 1001):
        growing.of(b"x" * length)
    assert max(decoded) <= 40
