from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfeval.errors import RunFolderError, StorageError
from selfeval.records import Drop, Question, Split
from selfeval.store import RunStore, check_files, fingerprint, read_json, write_json, writing

QUESTIONS = [Question(f"q{i}", f"How many {i}?", Split.TRAIN, "self") for i in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "run")
    store.update_run(schema=1)
    yield store
    store.close()


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def _fail_while_writing(path: Path, error: BaseException) -> None:
    with writing(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise error


# -- atomic writes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_no_trace(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(type(error)):
        _fail_while_writing(path, error)
    assert _tree(tmp_path) == {"file.json": b'{\n  "old": 1\n}\n'}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Quota"), "quota is used up"),
        (OSError(errno.EACCES, "Denied"), "permission denied"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_a_full_disk_is_a_storage_error_and_the_old_folder_stays(tmp_path: Path, error: Exception, reason: str) -> None:
    path = tmp_path / "role"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(StorageError, match=reason) as caught:
        _fail_while_writing(path, error)
    assert str(path) in str(caught.value)
    assert "Nothing is lost" in str(caught.value)
    assert _tree(tmp_path) == {"role/weights": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["role"]


def test_an_error_that_is_not_the_systems_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), writing(tmp_path / "file"):
        raise RuntimeError("shape mismatch (size 28)")


def test_what_a_killed_write_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".role.part").mkdir()
    (tmp_path / ".role.part" / "half").write_text("half")
    with writing(tmp_path / "role") as temporary:
        temporary.mkdir()
        (temporary / "whole").write_text("whole")
    assert _tree(tmp_path) == {"role/whole": b"whole"}


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(RunFolderError, match=r"bad\.json is damaged"):
        read_json(tmp_path / "bad.json")


def test_a_fingerprint_is_of_the_content() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint([1, [2]]) != fingerprint([[1], 2])


# -- whose folder -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_a_run_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not a run"):
        RunStore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunFolderError, match="is a file"):
        RunStore(tmp_path / "thesis.txt")


def test_an_empty_folder_and_one_killed_at_its_first_write_are_taken(tmp_path: Path) -> None:
    RunStore(tmp_path).close()
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.part").write_text("{")
    RunStore(tmp_path).close()


def test_a_second_process_is_kept_out_until_the_first_one_is_done(store: RunStore) -> None:
    code = f"from pathlib import Path; from selfeval.store import RunStore; RunStore(Path({str(store.root)!r}))"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"RunFolderError: another process works in {store.root}" in second.stderr.splitlines()[-1]
    store.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- stages -------------------------------------------------------------------------------------------------------------


def test_a_stage_is_finished_only_when_its_manifest_is_there(store: RunStore) -> None:
    assert store.begin("questions", "key") is False
    store.write_shard("questions", 0, QUESTIONS, [Drop("questions", "short", "x")])
    assert not store.is_finished("questions")
    store.finish("questions", "key", {"train": 3})
    assert store.is_finished("questions")
    manifest = store.manifest("questions")
    assert manifest["counts"] == {"train": 3}
    assert list(manifest["files"]) == ["questions/shard-00000.jsonl"]
    assert store.begin("questions", "key") is False
    assert store.is_finished("questions")


def test_the_manifest_is_the_last_thing_written(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    store.begin("questions", "key")
    store.write_shard("questions", 0, QUESTIONS, [Drop("questions", "short", "x")])
    store.finish("questions", "key", {})
    assert moved == ["key.json", "shard-00000.jsonl", "shard-00000.jsonl", "manifest.json"]


def _work(store: RunStore, key: str, text: str) -> bool:
    owned = [store.root / "roles" / "policy", store.root / "metrics" / "policy.jsonl"]
    moved = store.begin("policy", key, owned)
    store.write_shard("policy", 0, QUESTIONS)
    with writing(owned[0]) as folder:
        folder.mkdir()
        (folder / "weights").write_text(text)
    store.add_metrics("policy", {"step": 1, "text": text})
    store.record_stage("policy", state="finished", seconds=2.0)
    store.finish("policy", key, {})
    return moved


def test_work_of_another_key_is_moved_and_nothing_is_deleted(store: RunStore) -> None:
    assert not _work(store, "one", "first")
    before = _tree(store.root)
    assert _work(store, "two", "second")
    replaced = {name: data for name, data in _tree(store.root / "replaced" / "1").items() if name != "archive.json"}
    kept = {name: text for name, text in before.items() if not name.startswith(("run.json", "dropped"))}
    assert replaced == kept
    assert (store.root / "roles" / "policy" / "weights").read_text() == "second"
    assert store.read_metrics("policy") == [{"step": 1, "text": "second"}]
    assert store.run["stages"]["policy"]["seconds"] == 2.0, "the time of the old work is not that of the new"
    assert _work(store, "three", "third")
    assert (store.root / "replaced" / "2" / "roles" / "policy" / "weights").read_text() == "second"


def test_a_kill_while_old_work_is_moved_away_never_mixes_it_with_new(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _work(store, "one", "first")
    replace, calls = os.replace, 0

    def killed(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        replace(source, target)

    owned = [store.root / "roles" / "policy", store.root / "metrics" / "policy.jsonl"]
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.begin("policy", "two", owned)
    monkeypatch.setattr(os, "replace", replace)
    assert store.begin("policy", "two", owned)
    assert not any(path.exists() for path in owned)
    assert not store.is_finished("policy")
    assert store.shards("policy") == []


def test_a_changed_key_with_nothing_done_yet_is_not_announced(store: RunStore) -> None:
    store.begin("policy", "one")
    assert store.begin("policy", "two") is False
    assert read_json(store.folder("policy") / "key.json") == {"key": "two"}
    assert not (store.root / "replaced").exists()


def test_seconds_of_interrupted_tries_add_up(store: RunStore) -> None:
    store.record_stage("policy", state="interrupted", seconds=1.5)
    store.record_stage("policy", state="finished", seconds=2.0, counts={"iterations": 3})
    assert store.run["stages"]["policy"] == {"state": "finished", "seconds": 3.5, "counts": {"iterations": 3}}
    assert store.run["schema"] == 1


# -- records and metrics ------------------------------------------------------------------------------------------------


def test_records_come_back_in_order_whatever_they_say(store: RunStore) -> None:
    odd = [Question("q9", "one\u2028two\u0085three\nfour\r\x1cfive", Split.TEST, "seed")]
    store.write_shard("questions", 1, odd, [Drop("questions", "odd", "\u2029")])
    store.write_shard("questions", 0, QUESTIONS)
    assert store.read("questions", Question) == QUESTIONS + odd
    assert store.read_shard("questions", 1, Question) == odd
    assert store.read_dropped("questions") == [Drop("questions", "odd", "\u2029")]
    assert store.has_shard("questions", 1)
    assert not store.has_shard("questions", 2)
    store.write_shard("questions", 2, [])
    assert store.read_shard("questions", 2, Question) == []


@pytest.mark.parametrize("damage", [b'{"id": "q1"}', b'{"id"', b"\xff\xff", b"[1]", b""])
def test_a_damaged_shard_names_file_and_line(store: RunStore, damage: bytes) -> None:
    store.write_shard("questions", 0, QUESTIONS)
    path = store.folder("questions") / "shard-00000.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(RunFolderError, match=r"shard-00000\.jsonl, line 2 is damaged .*remove this file"):
        store.read("questions", Question)


def test_a_metrics_line_cut_by_a_kill_is_left_out(store: RunStore) -> None:
    for step in (1, 2):
        store.add_metrics("policy", {"step": step})
    with store.metrics_path("policy").open("a") as file:
        file.write('{"step": 3, "rew')
    assert store.read_metrics("policy") == [{"step": 1}, {"step": 2}]
    store.keep_metrics("policy", 2)
    store.add_metrics("policy", {"step": 3})
    assert [line["step"] for line in store.read_metrics("policy")] == [1, 2, 3]


def test_metrics_after_the_last_checkpoint_are_forgotten(store: RunStore) -> None:
    for step in (1, 2, 3, 4):
        store.add_metrics("policy", {"step": step})
    store.keep_metrics("policy", 2)
    assert store.read_metrics("policy") == [{"step": 1}, {"step": 2}]
    assert store.read_metrics("never") == []


def test_metrics_damaged_in_the_middle_are_no_traceback(store: RunStore) -> None:
    store.add_metrics("policy", {"step": 1})
    store.metrics_path("policy").write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(RunFolderError, match=r"policy\.jsonl is damaged"):
        store.read_metrics("policy")


def test_metrics_on_a_full_disk_are_a_storage_error(store: RunStore) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
    store.metrics_path("policy").parent.mkdir(parents=True)
    store.metrics_path("policy").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        store.add_metrics("policy", {"step": 1})


def test_files_are_utf8_and_readable(store: RunStore) -> None:
    store.write_shard("questions", 0, [Question("q1", "Où?", Split.TRAIN, "self")])
    text = (store.folder("questions") / "shard-00000.jsonl").read_text(encoding="utf-8")
    assert "Où?" in text
    assert json.loads(text)["split"] == "train"


def test_a_shard_that_was_changed_after_its_stage_finished_is_named(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.begin("questions", "k")
    store.write_shard("questions", 0, [Question("q0", "How many?", Split.TRAIN, "self")])
    store.finish("questions", "k", {})
    assert store.damaged_files("questions") == []
    shard = store.shards("questions")[0]
    shard.write_text(shard.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert store.damaged_files("questions") == ["questions/shard-00000.jsonl"]
    with pytest.raises(RunFolderError, match="is damaged: its content is not what was written"):
        check_files(store.root, [shard])
    shard.unlink()
    assert not store.is_finished("questions")
    store.close()
