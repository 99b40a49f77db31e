"""labels.jsonl: nothing that was saved is ever lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from label_world import label, pair
from processes import python, start_python
from selfeval.errors import RunFolderError
from selfeval.labelling.label_file import LabelFile
from selfeval.records import Label

ONE, TWO = label(pair(0), "first"), label(pair(1), "tie", "bøb\u2028")

APPENDING = """
import sys
from pathlib import Path
from selfeval.labelling.label_file import LabelFile
from selfeval.records import Label, LabelChoice

file = LabelFile(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    file.append(Label(str(number), "a", "b", LabelChoice.TIE, sys.argv[2], "2026", False, "x" * 200))
"""


def test_labels_are_read_in_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    file = LabelFile(tmp_path)
    assert file.read() == []
    for given in (ONE, TWO, replace(ONE, choice=TWO.choice)):
        file.append(given)
    assert LabelFile(tmp_path).read() == [ONE, TWO, replace(ONE, choice=TWO.choice)]


@pytest.mark.parametrize("tail", ['{"question_id": "q', '{"a": 1}', "x" * 200_000])
def test_a_line_that_was_cut_off_is_dropped_and_nothing_else(tmp_path: Path, tail: str) -> None:
    file = LabelFile(tmp_path)
    file.append(ONE)
    with file.path.open("a") as appended:
        appended.write(tail)
    assert file.read() == [ONE]
    file.append(TWO)
    assert file.read() == [ONE, TWO]
    assert file.path.read_bytes().count(b"\n") == 2


def test_a_file_with_only_a_cut_off_line_is_empty(tmp_path: Path) -> None:
    file = LabelFile(tmp_path)
    file.path.write_text('{"question')
    assert file.read() == []
    file.append(ONE)
    assert file.read() == [ONE]


@pytest.mark.parametrize("damage", ["{", "3", '{"question_id": "q1"}', json.dumps({**vars(ONE), "choice": "third"})])
def test_damage_before_the_end_is_refused_with_its_line(tmp_path: Path, damage: str) -> None:
    file = LabelFile(tmp_path)
    file.append(ONE)
    with file.path.open("a") as appended:
        appended.write(damage + "\n")
    with pytest.raises(RunFolderError, match=r"labels\.jsonl, line 2 is damaged .* the other labels are intact"):
        file.read()


def test_processes_and_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    others = [start_python(APPENDING, str(tmp_path), name, "40") for name in ("ann", "bob")]
    labels = [Label(str(n), "a", "b", ONE.choice, "here", "2026", False, "y" * 300) for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(LabelFile(tmp_path).append, labels))
    for other in others:
        other.communicate()
        assert other.returncode == 0
    found = LabelFile(tmp_path).read()
    assert {one.rater: sum(other.rater == one.rater for other in found) for one in found} == {"ann": 40, "bob": 40, "here": 40}


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    """A real limit of the system: the write that does not fit is accepted in part."""
    code = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n{APPENDING}"
    found = python(code, str(tmp_path), "ann", "40")
    assert found.returncode == 1
    assert "StorageError: cannot write" in found.stderr
    assert "Nothing is lost" in found.stderr
    saved = LabelFile(tmp_path).read()
    assert 20 < len(saved) < 40
    assert [one.question_id for one in saved] == [str(number) for number in range(len(saved))]
    assert LabelFile(tmp_path).path.read_bytes().endswith(b"\n")
    LabelFile(tmp_path).append(ONE)
    assert LabelFile(tmp_path).read() == [*saved, ONE]


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").mkdir()
    with pytest.raises(RunFolderError, match="is a folder, expected a file"):
        LabelFile(tmp_path).append(ONE)


def test_a_missing_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="run was removed"):
        LabelFile(tmp_path / "none" / "run").append(ONE)
