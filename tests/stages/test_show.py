from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selfeval.errors import RunFolderError
from selfeval.stages.show import KINDS, layout, read_rows


def _shard(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_first_records_are_shown_in_order(tmp_path: Path) -> None:
    _shard(tmp_path, "pairs/train/shard-00001.jsonl", [{"n": 3}])
    _shard(tmp_path, "pairs/train/shard-00000.jsonl", [{"n": 1}, {"n": 2, "text": "a\u2028b"}])
    assert read_rows(tmp_path, "pairs", 2) == [{"n": 1}, {"n": 2, "text": "a\u2028b"}]
    assert [row["n"] for row in read_rows(tmp_path, "pairs", 9)] == [1, 2, 3]


def test_dropped_records_come_from_every_stage(tmp_path: Path) -> None:
    _shard(tmp_path, "dropped/verdicts/shard-00000.jsonl", [{"reason": "tie"}])
    _shard(tmp_path, "dropped/questions/shard-00000.jsonl", [{"reason": "too_short"}])
    assert [row["reason"] for row in read_rows(tmp_path, "dropped", 5)] == ["too_short", "tie"]


def test_looking_takes_no_lock_and_writes_nothing(tmp_path: Path) -> None:
    _shard(tmp_path, "pairs/train/shard-00000.jsonl", [{"n": 1}])
    before = sorted(p.name for p in tmp_path.rglob("*"))
    read_rows(tmp_path, "pairs", 1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_unknown_kind_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match='no records "verdict"; did you mean "verdicts"'):
        read_rows(tmp_path, "verdict", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_not_written_yet_says_so(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RunFolderError, match=rf"has no {kind} \(yet\)"):
        read_rows(tmp_path, kind, 1)


@pytest.mark.parametrize("damage", ['{"n": ', "3"])
def test_a_damaged_record_names_file_and_line(tmp_path: Path, damage: str) -> None:
    path = _shard(tmp_path, "pairs/train/shard-00000.jsonl", [{"n": 1}])
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(RunFolderError, match=r"shard-00000\.jsonl, line 2 is damaged"):
        read_rows(tmp_path, "pairs", 5)


def test_training_pairs_are_shown_before_held_out_ones(tmp_path: Path) -> None:
    _shard(tmp_path, "pairs/test/shard-00000.jsonl", [{"split": "test"}])
    _shard(tmp_path, "pairs/train/shard-00000.jsonl", [{"split": "train"}])
    assert [row["split"] for row in read_rows(tmp_path, "pairs", 5)] == ["train", "test"]


def test_a_record_has_a_line_for_each_field_and_long_lists_are_cut() -> None:
    row = {"text": "a\u009b2J\u2028b", "ids": list(range(20)), "short": [1, 2], "words": ["x"] * 20}
    lines = layout(row).splitlines()
    assert lines[0] == "{"
    assert lines[1] == r'  "text": "a\u009b2J\u2028b",'
    assert lines[2] == f'  "ids": {json.dumps([*range(16), "... 20 in all"])},'
    assert lines[3] == '  "short": [1, 2],'
    shown = json.loads(layout(row))
    assert shown["text"] == row["text"]
    assert shown["words"] == row["words"]
