from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfeval import texts
from selfeval.errors import SeedsError
from selfeval.texts import format_bytes, json_lines, parse_json, read_text, visible


def _read(path: Path, most: int = 1 << 20) -> str:
    return read_text(path, "seeds file", SeedsError, most=most, remedy="give a file")


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert _read(tmp_path / "a.txt") == "one\ntwo\n"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """Opening a named pipe that nobody writes to would wait for ever, and /dev/zero would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, said in {
        tmp_path / "pipe": "is a named pipe or a device, not a file; give a file",
        Path("/dev/zero"): "is a named pipe or a device, not a file; give a file",
        tmp_path: "is a folder, not a file; give a file",
        tmp_path / "none": "does not exist; give a file",
        tmp_path / "loop": "cannot be read: Too many levels of symbolic links; give a file",
        tmp_path / "a\0b": r"a\x00b cannot be read: embedded null byte; give a file",
        tmp_path / ("x" * 300): "cannot be read: File name too long; give a file",
    }.items():
        with pytest.raises(SeedsError) as caught:
            _read(path)
        assert said in str(caught.value)


def test_a_file_above_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * (1 << 20))
    assert len(_read(path)) == 1 << 20
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(SeedsError, match="is larger than 1 MiB, the limit; use a smaller file"):
        _read(path)
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte that takes no room on the disk
    with pytest.raises(SeedsError, match="is larger than 1 MiB"):
        _read(tmp_path / "sparse.txt")


def test_lines_keep_their_numbers_and_separators_inside_texts() -> None:
    text = '{"a": "x\u2028y"}\n\n  {"a": 2}\n'
    assert list(json_lines(text, "f", SeedsError, "{}")) == [(1, {"a": "x\u2028y"}), (3, {"a": 2})]


def test_lines_that_arrive_as_bytes_are_read_alike_and_named_by_their_number() -> None:
    lines = iter([b'\xef\xbb\xbf{"a": 1}\n', b"\n", b'{"a": "\xff"}\n'])
    read = json_lines(lines, "standard input", SeedsError, "{}")
    assert next(read) == (1, {"a": 1})
    with pytest.raises(SeedsError, match=r"^standard input, line 3: not UTF-8 text .*; got .*; write one \{\} per line$"):
        next(read)


def test_a_line_longer_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_LINE", 1 << 20)
    line = '{"a": "' + "x" * (1 << 20) + '"}'
    with pytest.raises(SeedsError, match="f, line 2: it is longer than 1 MiB; got"):
        list(json_lines(f'{{"a": 1}}\n{line}', "f", SeedsError, "{}"))


def test_nesting_is_read_up_to_its_limit_wherever_the_caller_stands() -> None:
    def at(depth: int, text: str) -> object:
        return parse_json(text) if depth == 0 else at(depth - 1, text)

    assert parse_json("[" * 100 + "]" * 100) is not None
    for depth in (0, 600):
        with pytest.raises(ValueError, match="nested more than 100 levels deep"):
            at(depth, "[" * 101 + "]" * 101)
        with pytest.raises(ValueError, match="nested more than 100 levels deep"):
            at(depth, '{"a":' * 50_000 + "1" + "}" * 50_000)


def test_terminal_controls_are_shown_and_not_sent() -> None:
    assert visible("\x1b[31mred\x1b[0m\x9b2J\x07\x7f") == r"\x1b[31mred\x1b[0m\x9b2J\x07\x7f"
    assert visible("a\nb\tc\u202ed\ud800") == r"a\nb\tc\u202ed\ud800"
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert visible("Straße 😀 中文 שלום") == "Straße 😀 中文 שלום"


def test_bytes_have_a_binary_unit_and_the_digits_that_were_asked_for() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 900_000_000, -900_000_000)] == [
        "0 bytes", "1023 bytes", "1.00 KiB", "858 MiB", "-858 MiB",
    ]  # fmt: skip
    assert format_bytes(5 * 2**40) == "5,120 GiB"
    assert [format_bytes(int(24.006 * 2**30), digits=n) for n in (2, 3, 4)] == ["24 GiB", "24.0 GiB", "24.01 GiB"]


def test_lenient_parsing_is_for_files_of_our_own() -> None:
    assert parse_json(b'{"a": [1.5]}') == {"a": [1.5]}
    assert parse_json("[" * 200 + "]" * 200, lenient=True) is not None
    assert str(parse_json("[NaN, 1e999]", lenient=True)) == "[nan, inf]"
    for text in ("[NaN]", "[1e999]", b"\xff"):
        with pytest.raises(ValueError, match=r"NaN is not a JSON number|too large|utf-8"):
            parse_json(text)
