from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from processes import python
from selfeval.config import RunConfig
from selfeval.errors import SeedsError
from selfeval.records import Seed
from selfeval.stages.given import read_given
from selfeval.stages.running import new_config
from selfeval.stages.seeds import append_seed, asks_seeds, has_passages, read_seeds, seeds_of


def _file(folder: Path, content: bytes, name: str = "seeds.jsonl") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def _refusal(path: str) -> str:
    with pytest.raises(SeedsError) as caught:
        read_seeds(path)
    return str(caught.value)


def test_json_lines_keep_reply_and_other_fields(tmp_path: Path) -> None:
    content = b'{"question": " How many? ", "reply": "Two.", "level": 3}\n\n{"question": "Why?"}\n'
    assert read_seeds(_file(tmp_path, content)) == [Seed("How many?", "Two.", {"level": 3}), Seed("Why?")]


def test_a_conversation_is_a_seed_with_its_first_question(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "How many?"), ("assistant", "Two."), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = read_seeds(_file(tmp_path, json.dumps({"messages": messages}).encode()))
    assert found == [Seed("How many?", None, {"messages": messages})]
    refused = json.dumps({"messages": messages[:3]}).encode()
    assert 'line 1: "messages" must end with a turn of the user, got assistant' in _refusal(_file(tmp_path, refused))


def test_plain_text_is_one_question_a_line(tmp_path: Path) -> None:
    assert read_seeds(_file(tmp_path, b"How many?\n\n  Why? \r\n", "seeds.txt")) == [Seed("How many?"), Seed("Why?")]


def test_json_lines_are_known_by_their_first_line_too(tmp_path: Path) -> None:
    assert read_seeds(_file(tmp_path, b'\xef\xbb\xbf{"question": "Why?"}\n', "seeds.txt")) == [Seed("Why?")]


def test_a_line_separator_inside_a_question_does_not_end_its_line(tmp_path: Path) -> None:
    content = '{"question": "One\u2028two?"}\n{"question": "Three\u0085four?"}\n'.encode()
    assert [seed.question for seed in read_seeds(_file(tmp_path, content))] == ["One\u2028two?", "Three\u0085four?"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no questions"),
        (b"  \n\n", "has no questions"),
        (b'{"question": "Why?"}\n{"question": ', 'line 2: not JSON (Expecting value); got {"question":; write'),
        (b'\n\n{"text": "Why?"}\n', 'line 3: missing or empty "question"; got {"text": "Why?"}'),
        (b'{"question": 3}\n', 'line 1: missing or empty "question"; got {"question": 3}'),
        (b'{"question": "  "}\n', 'line 1: missing or empty "question"'),
        (b'["Why?"]\n', 'line 1: not a JSON object; got ["Why?"]'),
        (b'{"question": "Why?", "reply": 4}\n', 'line 1: "reply" must be a string; got 4'),
        (b'{"question": "\\ud800?"}\n', "line 1: an unpaired surrogate; got"),
        (b'{"question": "Why?", "reply": "\\ud83d"}\n', "line 1: an unpaired surrogate; got"),
        (b'{"question": "Why?", "source": ["forum \\ud83d"]}\n', "line 1: an unpaired surrogate; got"),
        (b'{"question": "Why?", "\\ud83d": 1}\n', "line 1: an unpaired surrogate; got"),
        (
            b'{"question": "Why?", "x": ' + b"[" * 200 + b"]" * 200 + b"}\n",
            "line 1: not JSON (nested more than 100 levels deep)",
        ),
        (b'{"question": "Why?", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested more than 100 levels deep"),
        (b'{"question": "Why?", "x": ' + b"9" * 5000 + b"}\n", "line 1: not JSON (an integer with thousands of digits)"),
        (b'{"question": "Why?", "x": 1e999}\n', "line 1: not JSON (the number 1e999 is too large)"),
        (b'{"question": "Why?", "x": NaN}\n', "line 1: not JSON (NaN is not a JSON number)"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_read_names_file_line_and_what_stood_there(tmp_path: Path, content: bytes, said: str) -> None:
    path = _file(tmp_path, content)
    message = _refusal(path)
    assert path in message
    assert said in message


def test_a_long_line_is_cut_in_the_message(tmp_path: Path) -> None:
    message = _refusal(_file(tmp_path, b"{" + b"x" * 5000))
    assert "xxx..." in message
    assert len(message) < 300 + len(str(tmp_path))


def test_no_file(tmp_path: Path) -> None:
    assert "no seeds were given; pass --seeds" in _refusal("")
    assert "does not exist" in _refusal(str(tmp_path / "none.jsonl"))
    assert "is a folder, not a file" in _refusal(str(tmp_path))


# -- adding a seed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"", b'{"question": "Old?"}', b'{"question": "Old?"}\n', b'{"question": "Old?"}\r\n'])
def test_a_seed_is_appended_on_a_line_of_its_own(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "seeds.jsonl"
    if before is not None:
        path.write_bytes(before)
    append_seed(path, "Why?\x1b[0m \u2028", "So.")
    append_seed(path, "How?")
    old = [Seed("Old?")] if before else []
    assert read_seeds(str(path)) == [*old, Seed("Why?\x1b[0m", "So."), Seed("How?")]
    assert path.read_bytes().startswith(before or b"")
    assert b"\x1b" not in path.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("seeds.jsonl", b'{"question": "Why?"', "line 1: not JSON"),
        ("seeds.json", b'["Why?"]', "not a JSON object"),
        ("seeds.jsonl", b"\xff\n", "is not UTF-8"),
        ("seeds.txt", b"Why?\n", "does not end in .jsonl or .json; seeds are saved as JSON lines"),
    ],
)
def test_a_file_that_is_no_seeds_file_is_not_changed(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SeedsError, match=re.escape(said)):
        append_seed(path, "How?")
    assert path.read_bytes() == content


def test_half_a_line_is_removed_again(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_bytes(b'{"question": "Old?"}')
    found = python(ON_A_DISK_OF_100_BYTES, str(path))
    assert found.returncode == 7
    assert path.read_bytes() == b'{"question": "Old?"}'


ON_A_DISK_OF_100_BYTES = """
import resource, signal, sys
from pathlib import Path
from selfeval.errors import StorageError
from selfeval.stages.seeds import append_seed

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    append_seed(Path(sys.argv[1]), "x" * 500)
except StorageError:
    sys.exit(7)
"""


# -- passages --------------------------------------------------------------------------------------------------------------


def _lines(folder: Path, *rows: dict[str, str]) -> str:
    return _file(folder, "".join(json.dumps(row) + "\n" for row in rows).encode())


GROUNDED = [{"question": f"How much is bike {n}?", "passage": f"Bike {n} is {n} euros."} for n in range(8)]


def test_seeds_with_passages_are_the_questions_of_the_run(tmp_path: Path) -> None:
    path = _lines(tmp_path, *GROUNDED)
    config = new_config(model="some/model", seeds=path, count=lambda name: 10**9)
    assert (config.seeds, config.questions.file) == (path, path)
    assert asks_seeds(config)
    given = read_given(config)
    assert given is not None
    assert "Bike 3 is 3 euros.\n\nQuestion: How much is bike 3?" in given.questions[3].text
    assert [seed.question for seed in seeds_of(config, given)][3] == "How much is bike 3?"


def test_another_file_keeps_its_place(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"Why {n}?" for n in range(8)))
    config = new_config(
        model="some/model",
        seeds=_lines(tmp_path, *GROUNDED),
        assignments=[f"questions.file={other}"],
        count=lambda name: 10**9,
    )
    assert config.questions.file == str(other)
    assert not asks_seeds(config)


def test_seeds_of_which_only_some_have_a_passage_are_refused(tmp_path: Path) -> None:
    path = _lines(tmp_path, *GROUNDED, {"question": "Why?"})
    with pytest.raises(SeedsError, match=r'8 questions with a passage and 1 without one, such as "Why\?"; make two files'):
        new_config(model="some/model", seeds=path, count=lambda name: 10**9)
    assert not has_passages(_lines(tmp_path, {"question": "Why?"}))
    assert not has_passages(str(tmp_path / "nowhere.jsonl"))


def test_passages_are_never_ignored_in_silence(tmp_path: Path) -> None:
    config = RunConfig(seeds=_lines(tmp_path, *GROUNDED))
    with pytest.raises(SeedsError, match=r"has passages, and generated questions would have none; also set questions\.file"):
        seeds_of(config, None)
