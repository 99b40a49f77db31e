from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from killed_steps import killed_at
from selfeval.errors import RunFolderError, StorageError
from selfeval.records import Drop, Question, Split
from selfeval.store import (
    RUN_SCHEMA,
    Archive,
    Changed,
    Damaged,
    Expected,
    Fresh,
    Ledger,
    Missing,
    Output,
    RunStore,
    State,
    check_files,
    fingerprint,
    has_manifest,
    read_json,
    read_run,
    write_json,
    write_sealed,
    writing,
)
from selfeval.store.ledger import read_key
from selfeval.texts import read_text

QUESTIONS = [Question(f"q{i}", f"How many {i}?", Split.TRAIN, "self") for i in range(3)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    store = RunStore(tmp_path / "run")
    store.update_run(schema=RUN_SCHEMA)
    yield store
    store.close()


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def _whole(folder: Path) -> dict[str, bytes]:
    """Return the files without the parts that a killed write left behind."""
    return {name: data for name, data in _tree(folder).items() if not name.endswith(".part")}


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


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_what_is_written_has_the_mode_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    """Weights too, which safetensors writes as 0600."""
    before = os.umask(umask)
    try:
        with writing(tmp_path / "one.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
        with writing(tmp_path / "role") as temporary:
            (temporary / "in").mkdir(parents=True)
            save_file({"a": torch.zeros(2)}, temporary / "in" / "weights.safetensors")
            (temporary / "copied").write_text("from a folder that only its owner could read")
            (temporary / "copied").chmod(0o400)
        write_json(tmp_path / "record.json", {})
    finally:
        assert os.umask(before) == umask
    written = [tmp_path / "one.safetensors", tmp_path / "record.json", *(tmp_path / "role").rglob("*")]
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in written}
    assert modes == {
        "one.safetensors": file,
        "record.json": file,
        "role/in": folder,
        "role/in/weights.safetensors": file,
        "role/copied": file,
    }


def test_what_a_killed_write_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".role.part").mkdir()
    (tmp_path / ".role.part" / "half").write_text("half")
    with writing(tmp_path / "role") as temporary:
        temporary.mkdir()
        (temporary / "whole").write_text("whole")
    assert _tree(tmp_path) == {"role/whole": b"whole"}


def _replace_role(path: Path, text: str) -> None:
    with writing(path) as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text(text)


def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    for step in itertools.count(1):
        store = RunStore(tmp_path / str(step))
        store.update_run(schema=RUN_SCHEMA)
        path = store.root / "roles" / "policy"
        _replace_role(path, "old")
        killed = killed_at(step, lambda path=path: _replace_role(path, "new"))
        store.close()
        RunStore(store.root).close()
        assert (path / "weights").read_text() in (("old", "new") if killed else ("new",))
        _replace_role(path, "newest")
        assert _tree(path.parent) == {"policy/weights": b"newest"}
        if not killed:
            break
    assert step > 3


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "role", os.replace
    _replace_role(path, "old")

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == ".role.part":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="input/output error"):
        _replace_role(path, "new")
    assert _tree(tmp_path) == {"role/weights": b"old"}


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    (tmp_path / "report.json" / "mine").write_text("mine")
    with pytest.raises(StorageError, match="a folder of that name exists"):
        write_json(tmp_path / "report.json", {})
    assert _tree(tmp_path) == {"report.json/mine": b"mine"}


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


@pytest.mark.parametrize("again", [False, True], ids=["gone", "made again"])
def test_a_folder_that_was_removed_is_not_created_again(store: RunStore, again: bool) -> None:
    """Its shards would belong to no configuration, and no lock would keep another process out."""
    shutil.rmtree(store.root)
    if again:
        store.root.mkdir()
    writes = (
        lambda: store.update_run(status="interrupted"),
        lambda: store.begin("questions", "k"),
        lambda: store.write_shard("questions", 0, QUESTIONS),
        lambda: store.add_metrics("policy", {"step": 1}),
        lambda: store.finish("questions", "k", {}),
        lambda: store.write_json(store.root / "report.json", {}),
        lambda: store.write_text(store.root / "metrics" / "evaluation.jsonl", ""),
    )
    for write in writes:
        with pytest.raises(
            RunFolderError, match=r"run was removed or replaced while .*move it back and rerun the same command"
        ):
            write()
    assert list(store.root.rglob("*")) == []


def test_a_second_process_is_kept_out_until_the_first_one_is_done(store: RunStore) -> None:
    code = f"from pathlib import Path; from selfeval.store import RunStore; RunStore(Path({str(store.root)!r}))"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"RunFolderError: another process is using {store.root}" in second.stderr.splitlines()[-1]
    store.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- stages -------------------------------------------------------------------------------------------------------------


def test_a_stage_is_finished_only_when_its_manifest_is_there(store: RunStore) -> None:
    ledger = Ledger(store.root, {"questions": Expected("key")})
    assert ledger.state("questions") == Missing()
    store.begin("questions", "key")
    store.write_shard("questions", 0, QUESTIONS, [Drop("questions", "short", "x")])
    assert ledger.state("questions") == Missing()
    store.finish("questions", "key", {"train": 3})
    assert ledger.state("questions") == Fresh()
    manifest = store.manifest("questions")
    assert manifest["counts"] == {"train": 3}
    assert list(manifest["files"]) == ["questions/shard-00000.jsonl"]
    store.begin("questions", "key")
    assert ledger.state("questions") == Fresh()


def test_the_states_of_a_stage(store: RunStore) -> None:
    """Each of the four, and which comes first where two hold."""
    reads = [Output(store.root, "questions"), 3]
    ledger = Ledger(store.root, {"replies": Expected("key", reads)})
    store.begin("replies", "key", "from other questions")
    assert ledger.state("replies") == Missing(), "inputs that are not finished are not compared"
    store.finish("questions", "q", {})
    assert ledger.state("replies") == Missing(), "there are no results of other inputs"
    store.write_shard("replies", 0, QUESTIONS[:1])
    assert ledger.state("replies") == Changed("inputs")
    inputs = ledger.expected["replies"].inputs
    assert inputs == fingerprint([Output(store.root, "questions").content, 3])
    store.begin("replies", "key", inputs)
    store.write_shard("replies", 0, QUESTIONS)
    store.finish("replies", "key", {}, inputs=inputs)
    assert ledger.state("replies") == Fresh()
    shard = store.shards("replies")[0]
    shard.write_bytes(b"{}")
    assert ledger.state("replies") == Damaged("replies/shard-00000.jsonl")
    store.finish("questions", "q", {}, inputs="others")
    assert ledger.state("replies") == Damaged("replies/shard-00000.jsonl")
    shard.unlink()
    assert ledger.state("replies") == Changed("inputs")
    assert Ledger(store.root, {"replies": Expected("other")}).state("replies") == Changed("configuration")
    assert Ledger(store.root).state("replies") == Missing(("replies/shard-00000.jsonl",))


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
    assert moved == ["key.json", "written.json", "shard-00000.jsonl", "shard-00000.jsonl", "manifest.json"]


def _owned(store: RunStore) -> list[Path]:
    return [store.root / "roles" / "policy", store.root / "metrics" / "policy.jsonl"]


def _policy_state(store: RunStore, key: str) -> State:
    return Ledger(store.root, {"policy": Expected(key, owned=_owned(store))}).state("policy")


def _work(store: RunStore, key: str, text: str) -> bool:
    owned = _owned(store)
    moved = _policy_state(store, key) == Changed("configuration")
    if moved:
        store.set_aside("policy", owned)
    store.begin("policy", key)
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

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.set_aside("policy", _owned(store))
    monkeypatch.setattr(os, "replace", replace)
    assert _policy_state(store, "two") == Changed("configuration")
    store.set_aside("policy", _owned(store))
    assert not any(path.exists() for path in _owned(store))
    assert _policy_state(store, "two") == Missing()
    assert store.shards("policy") == []


def test_a_kill_at_any_step_of_setting_aside_leaves_one_number(tmp_path: Path) -> None:
    """The next process that opens the folder completes it, even if the configuration was changed back."""
    for step in itertools.count(1):
        store = RunStore(tmp_path / str(step))
        store.update_run(schema=RUN_SCHEMA, config={"seed": 1})
        _work(store, "one", "first")
        before, row = _whole(store.root), store.run["stages"]["policy"]
        killed = killed_at(step, lambda store=store: store.set_aside("policy", _owned(store)))
        store.close()
        store = RunStore(store.root)
        if not Archive(store.root).numbers():
            assert _whole(store.root) == before, "it was killed before it began"
            store.set_aside("policy", _owned(store))
        assert store.run["stages"] == {}
        archive = Archive(store.root)
        assert archive.numbers() == [1]
        assert archive.facts(1)["stages"] == {"policy": row}
        moved = {name.removeprefix("replaced/1/"): data for name, data in _whole(store.root).items() if name != "run.json"}
        kept = {name: data for name, data in before.items() if name != "run.json"}
        assert {name: data for name, data in moved.items() if name != "archive.json"} == kept
        store.close()
        if not killed:
            break
    assert step > 8


def test_a_changed_key_with_nothing_done_yet_is_not_announced(store: RunStore) -> None:
    store.begin("policy", "one")
    assert _policy_state(store, "two") == Missing()
    store.begin("policy", "two", "inputs")
    assert read_key(store.root, "policy") == {"key": "two", "inputs": "inputs"}


def test_a_changed_value_in_key_json_is_damage_and_not_another_configuration(store: RunStore) -> None:
    """Otherwise intact results would be moved aside as those of another configuration."""
    store.begin("policy", "one")
    path = store.folder("policy") / "key.json"
    path.write_text(path.read_text().replace("one", "two"))
    with pytest.raises(RunFolderError, match=r"key\.json is damaged .*remove it and rerun the same command"):
        _policy_state(store, "one")


def test_seconds_of_interrupted_tries_add_up(store: RunStore) -> None:
    store.record_stage("policy", state="interrupted", seconds=1.5)
    store.record_stage("policy", state="finished", seconds=2.0, counts={"iterations": 3})
    assert store.run["stages"]["policy"] == {"state": "finished", "seconds": 3.5, "counts": {"iterations": 3}}
    assert store.run["schema"] == RUN_SCHEMA


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


def _two_shards(store: RunStore) -> list[Path]:
    """A stage that was killed after two shards, and every file of them."""
    store.begin("questions", "one")
    for index in (0, 1):
        store.write_shard("questions", index, QUESTIONS, [Drop("questions", "odd", f"text {index}")])
    return [store.root / kind / f"shard-{i:05d}.jsonl" for kind in ("questions", "dropped/questions") for i in (0, 1)]


def test_a_shard_from_before_a_stage_dropped_records_counts_and_one_that_lost_its_drops_does_not(store: RunStore) -> None:
    store.write_shard("replies", 0, QUESTIONS)
    store.write_shard("replies", 1, QUESTIONS, [])
    assert [store.has_shard("replies", index, drops=None) for index in (0, 1, 2)] == [True, True, False]
    assert not store.has_shard("replies", 0, drops=True)
    (store.root / "dropped" / "replies" / "shard-00001.jsonl").unlink()
    assert not store.has_shard("replies", 1, drops=None)


@pytest.mark.parametrize("number", range(4))
def test_a_shard_of_an_interrupted_stage_that_was_changed_is_refused_and_the_remedy_works(store: RunStore, number: int) -> None:
    path, index = _two_shards(store)[number], number % 2
    before = path.read_bytes()
    path.write_bytes(before.replace(b"many", b"few ").replace(b"text", b"TEXT"))
    with pytest.raises(
        RunFolderError, match=r"is damaged: its content does not match its recorded hash; remove this file"
    ) as found:
        store.has_shard("questions", index, drops=True)
    with pytest.raises(RunFolderError, match="is damaged"):
        check_files(store.root, [path])  # as `show` does
    named = re.match(r"(\S+) is damaged.*; remove this file and rerun the same command", str(found.value))
    assert named
    Path(named.group(1)).unlink()
    assert not store.has_shard("questions", index, drops=True)
    assert store.has_shard("questions", 1 - index, drops=True)
    store.write_shard("questions", index, QUESTIONS, [Drop("questions", "odd", f"text {index}")])
    assert store.has_shard("questions", index, drops=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_while_a_shard_is_written_loses_no_other_and_leaves_none_that_is_refused(
    store: RunStore, monkeypatch: pytest.MonkeyPatch, writes: int, again: bool
) -> None:
    """The journal, the dropped records and the shard are three writes; the kill comes after the first `writes` of them."""
    _two_shards(store)
    replace, left, index = os.replace, [writes], 1 if again else 2

    def killed(source: str, target: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    try:
        store.write_shard("questions", index, QUESTIONS[:2], [Drop("questions", "odd", "another text")])
    except KeyboardInterrupt:
        assert writes < 3
    monkeypatch.undo()
    assert [store.has_shard("questions", i, drops=True) for i in (0, 1)] == [True, not again or writes == 3]
    assert store.has_shard("questions", index, drops=True) is (writes == 3)
    store.write_shard("questions", index, QUESTIONS[:2], [Drop("questions", "odd", "another text")])
    assert store.has_shard("questions", index, drops=True)


def test_shards_that_no_journal_knows_are_made_again(store: RunStore) -> None:
    """Those of a version without journals; and a damaged journal is removed, as its message says."""
    _two_shards(store)
    journal = store.folder("questions") / "written.json"
    journal.write_text(journal.read_text().replace("shard-00001", "shard-00007"))
    with pytest.raises(RunFolderError, match=r"written\.json is damaged .*; remove it and rerun the same command"):
        store.has_shard("questions", 0, drops=True)
    journal.unlink()
    assert not any(store.has_shard("questions", index, drops=True) for index in (0, 1))
    store.write_shard("questions", 0, QUESTIONS, [])
    assert [store.has_shard("questions", index, drops=True) for index in (0, 1)] == [True, False]


def test_a_finished_stage_without_a_journal_gets_it_from_its_manifest(store: RunStore) -> None:
    paths = _two_shards(store)
    store.finish("questions", "one", {}, also=[store.root / "dropped" / "questions"])
    (store.folder("questions") / "written.json").unlink()
    paths[0].unlink()
    store.reopen("questions")
    assert [store.has_shard("questions", index, drops=True) for index in (0, 1)] == [False, True]
    paths[1].write_bytes(paths[1].read_bytes().replace(b"many", b"few "))
    with pytest.raises(RunFolderError, match="is damaged"):
        store.has_shard("questions", 1, drops=True)


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
    with pytest.raises(RunFolderError, match=r"policy\.jsonl, line 1 is damaged"):
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
    assert Ledger(store.root).state("questions") == Fresh()
    shard = store.shards("questions")[0]
    shard.write_text(shard.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert Ledger(store.root).state("questions") == Damaged("questions/shard-00000.jsonl")
    with pytest.raises(RunFolderError, match="is damaged: its content does not match its recorded hash"):
        check_files(store.root, [shard])
    shard.unlink()
    assert Ledger(store.root).state("questions") == Missing(("questions/shard-00000.jsonl",))
    store.close()


# -- causes of storage errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (errno.ENOSPC, "the disk is full", "free some space"),
        (errno.EACCES, "permission denied", "make it writable"),
        (errno.EROFS, "mounted read-only", "copy the folder to another disk"),
        (errno.ENAMETOOLONG, "the name is too long", "a shorter path"),
        (errno.EISDIR, "a folder of that name exists", "move that folder away"),
        (errno.ELOOP, "a loop of symbolic links", "remove the link"),
        (errno.EIO, "input/output error", "check the disk"),
        (errno.EMFILE, "too many files open", "ulimit -n"),
        (errno.ENOTSUP, os.strerror(errno.ENOTSUP), "fix this"),
    ],
)
def test_a_storage_error_names_its_cause_and_what_helps(tmp_path: Path, number: int, cause: str, remedy: str) -> None:
    with pytest.raises(StorageError, match=f"{re.escape(cause)}.* Nothing is lost: .*{remedy}") as caught:
        _fail_while_writing(tmp_path / "role", OSError(number, os.strerror(number)))
    assert ("free some space" in str(caught.value)) == (number == errno.ENOSPC)


def test_real_causes_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(StorageError, match=rf"{tmp_path / 'notes'} is a file, not a folder\. Nothing is lost: move that file"):
        write_json(tmp_path / "notes" / "deep" / "run.json", {})
    with pytest.raises(StorageError, match="notes is a file, not a folder"):
        RunStore(tmp_path / "notes" / "run")
    with pytest.raises(StorageError, match="the name is too long"):
        RunStore(tmp_path / ("x" * 300))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageError, match="a loop of symbolic links"):
        RunStore(tmp_path / "loop" / "run")


# -- damage and bounds --------------------------------------------------------------------------------------------------

GARBAGE = [b"", b"[]", b"{}", b"null", b"3", b'"text"', b"\xff\xfe", b"{", b"[" * 200_000, b'{"key": ' + b"9" * 5000 + b"}"]


def _questions(root: Path) -> RunStore:
    store = RunStore(root)
    store.update_run(schema=RUN_SCHEMA)
    store.begin("questions", "k")
    store.write_shard("questions", 0, QUESTIONS, [Drop("questions", "short", "x")])
    store.finish("questions", "k", {"train": 3}, also=[root / "dropped" / "questions"])
    return store


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda data: repr(data[:9]))
@pytest.mark.parametrize("name", ["run.json", "questions/key.json", "questions/manifest.json"])
def test_garbage_in_the_folders_own_files_is_named_and_the_remedy_works(tmp_path: Path, name: str, garbage: bytes) -> None:
    store = _questions(tmp_path / "run")
    path = store.root / name
    path.write_bytes(garbage)

    def use() -> None:
        store.update_run(status="running")
        ledger = Ledger(store.root, {"questions": Expected("k")})
        assert ledger.key("questions") == "k"
        assert ledger.state("questions") == (Fresh() if has_manifest(store.root, "questions") else Missing())

    with pytest.raises(RunFolderError, match=rf"{path} (is damaged|has no) .*remove it and rerun the") as caught:
        use()
    assert len(str(caught.value)) < 400
    path.unlink()
    store.close()
    store = RunStore(tmp_path / "run")  # it is a run without any one of these files
    use()
    assert store.read("questions", Question) == QUESTIONS
    store.close()


def test_a_run_of_another_version_is_refused_with_one_message(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.update_run(schema=1, status="finished")
    store.close()
    expected = (
        r"run\.json was written by another version of selfeval: it has schema 1, this version reads schema 4\. .*--output NEW"
    )
    with pytest.raises(RunFolderError, match=expected):
        read_run(store.root)
    with pytest.raises(RunFolderError, match=expected):
        _ = store.run


@pytest.mark.parametrize("name", ["run.json", "questions/manifest.json"])
def test_a_changed_value_of_a_sealed_file_is_noticed(tmp_path: Path, name: str) -> None:
    store = _questions(tmp_path / "run")
    path = store.root / name
    path.write_text(path.read_text().replace(f'"schema": {RUN_SCHEMA}', '"schema": 1').replace('"train": 3', '"train": 4'))
    with pytest.raises(RunFolderError, match="its values do not match their hash"):
        _ = (store.run, store.manifest("questions"))
    store.close()


def test_a_run_json_without_its_hash_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    """Otherwise removing the hash would be enough to edit a value unnoticed."""
    store = _questions(tmp_path / "run")
    path = store.root / "run.json"
    write_json(path, {name: value for name, value in store.run.items() if name != "hash"} | {"seed": 7})
    said = r'run\.json has no "hash" of its content.*restore it from a backup, or remove it and rerun the full command'
    with pytest.raises(RunFolderError, match=said):
        read_run(store.root)
    with pytest.raises(RunFolderError, match=said):
        store.update_run(status="running")
    path.unlink()
    store.update_run(schema=RUN_SCHEMA, status="running")
    assert read_run(store.root)["status"] == "running"
    store.close()


def test_a_lost_file_of_dropped_records_makes_its_shard_run_again(tmp_path: Path) -> None:
    store = _questions(tmp_path / "run")
    path = store.root / "dropped" / "questions" / "shard-00000.jsonl"
    path.write_text("{")
    with pytest.raises(RunFolderError, match=r"remove this file and rerun the same command to redo the shard"):
        store.read_dropped("questions")
    path.unlink()
    assert Ledger(store.root).state("questions") == Missing(("dropped/questions/shard-00000.jsonl",))
    assert not store.has_shard("questions", 0, drops=True)
    store.reopen("questions")
    assert not store.has_shard("questions", 0)
    store.close()


HOSTILE = {
    "an integer of 5,000 digits": b'{"id": ' + b"9" * 5000 + b"}",
    "an integer of 65 bits": b'{"id": "q", "text": "t", "split": "train", "source": 18446744073709551616}',
    "deep": b"[" * 200_000,
    "another type": b'{"id": 3, "text": "t", "split": "train", "source": "self"}',
    "another split": b'{"id": "q", "text": "t", "split": "valid", "source": "self"}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_records_are_one_short_message(store: RunStore, kind: str) -> None:
    store.write_shard("questions", 0, QUESTIONS)
    with store.shard_path("questions", 0).open("ab") as file:
        file.write(HOSTILE[kind] + b"\n")
    with pytest.raises(RunFolderError, match=r"shard-00000\.jsonl, line 4 is damaged") as caught:
        store.read("questions", Question)
    assert len(str(caught.value)) < 500


def test_an_endless_line_is_read_up_to_a_bound_only(store: RunStore) -> None:
    store.write_shard("questions", 0, QUESTIONS)
    with store.shard_path("questions", 0).open("ab") as file:
        file.truncate(1 << 40)  # sparse: a terabyte of zeros on no disk space
    with pytest.raises(RunFolderError, match=r"line 4 is damaged .*longer than 64 MiB"):
        store.read("questions", Question)
    with (store.root / "run.json").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(RunFolderError, match=r"run\.json is damaged .*more than 256 MiB"):
        _ = store.run


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["run.json", "questions/key.json", "questions/shard-00000.jsonl", "metrics/policy.jsonl"])
def test_a_named_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    store = _questions(tmp_path / "run")
    path = store.root / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(RunFolderError, match=rf"{path} is a device or named pipe, expected a file; remove it"):
        _ = (store.run, Ledger(store.root).key("questions"), store.read("questions", Question), store.read_metrics("policy"))
    store.close()


def test_a_loop_of_links_in_place_of_a_file_is_refused(store: RunStore) -> None:
    (store.root / "run.json").unlink()
    (store.root / "run.json").symlink_to(store.root / "run.json")
    with pytest.raises(RunFolderError, match=r"run\.json"):
        read_json(store.root / "run.json")


@pytest.mark.parametrize("place", ["metrics", "checkpoints", "error.log", "metrics/policy.jsonl", "rounds/02", ".lock"])
def test_a_link_that_leads_out_of_a_run_folder_is_not_written_through(tmp_path: Path, place: str) -> None:
    """A run folder may be somebody else's; `run` appends to its metrics and deletes its old checkpoints."""
    root, outside = tmp_path / "run", tmp_path / "outside"
    write_sealed(root / "run.json", {})
    outside.mkdir()
    (outside / "kept.txt").write_text("ours")
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(outside / "kept.txt" if "." in place else outside)
    with pytest.raises(RunFolderError, match=rf"{re.escape(place)} is a link to .*outside.*replace it with a copy"):
        RunStore(root)
    assert [(p.name, p.read_text()) for p in outside.iterdir()] == [("kept.txt", "ours")]


@pytest.mark.parametrize("name", ["../x/keys", "../../.ssh/keys", "policy/../../../keys", "/etc/keys", "", "a\0b", 3, None])
def test_an_archive_restores_nothing_outside_of_its_run_folder(tmp_path: Path, name: object) -> None:
    """`restore` moves DIR/replaced/1/NAME to DIR/NAME: with `..` in it, a file of the folder would land anywhere."""
    root = tmp_path / "a" / "b" / "run"
    facts = {"config": {}, "keys": {}, "stages": {"policy": {}}, "paths": [name]}
    write_json(root / "replaced" / "1" / "archive.json", facts)
    for planted in (root / "replaced" / "x", root / ".ssh"):
        planted.mkdir()
        (planted / "keys").write_text("theirs")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderError, match=r"archive\.json is damaged .*not a path in the run folder"):
        Archive(root).facts(1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../outside/shard-00000.jsonl", "/tmp/shard-00000.jsonl", "questions/../../x", ""])
@pytest.mark.parametrize("section", ["files", "also", "journal"])
def test_a_manifest_or_journal_names_nothing_outside_of_its_run_folder(tmp_path: Path, section: str, name: str) -> None:
    """`reopen` writes a journal next to each shard of the manifest, and every listed file is read to be hashed."""
    store = _questions(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    path = store.folder("questions") / ("written.json" if section == "journal" else "manifest.json")
    values = read_json(path)
    values["shards" if section == "journal" else section][name] = "0" * 64
    write_sealed(path, values)
    if section == "journal":
        (store.folder("questions") / "manifest.json").unlink()
    expected = rf"{path.name} is damaged \(it lists '{re.escape(name)}', which is not a path in the run folder"
    with pytest.raises(RunFolderError, match=expected):
        store.reopen("questions") if section != "journal" else store.has_shard("questions", 0)
    with pytest.raises(RunFolderError, match=expected):
        check_files(store.root, store.shards("questions"))
    assert list((tmp_path / "outside").iterdir()) == []
    store.close()


@pytest.mark.parametrize("value", [3, ["a"], {"questions/shard-00000.jsonl": 3}])
def test_a_manifest_whose_files_are_something_else_is_refused(tmp_path: Path, value: object) -> None:
    store = _questions(tmp_path / "run")
    path = store.folder("questions") / "manifest.json"
    write_sealed(path, {**read_json(path), "files": value})
    with pytest.raises(RunFolderError, match=r"manifest\.json is damaged .*remove it and rerun"):
        Ledger(store.root).state("questions")
    store.close()


def test_an_archive_without_a_list_of_paths_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "replaced" / "1" / "archive.json", {"config": {}, "keys": {}, "stages": {}, "paths": "policy"})
    with pytest.raises(RunFolderError, match=r"paths are a str, expected a list"):
        Archive(tmp_path).facts(1)


@pytest.mark.parametrize("name", ["config", "keys", "stages"])
@pytest.mark.parametrize("value", [[1], "text", 3])
def test_an_archive_with_damaged_facts_is_refused(tmp_path: Path, name: str, value: object) -> None:
    facts = {"config": {}, "keys": {}, "stages": {}, "paths": [], name: value}
    write_json(tmp_path / "replaced" / "1" / "archive.json", facts)
    with pytest.raises(RunFolderError, match=rf"archive\.json is damaged \(the values of '{name}' are not objects"):
        Archive(tmp_path).facts(1)


@pytest.mark.parametrize("row", [{"seconds": "1\nforged"}, {"seconds": None}, {"counts": [1]}, {"counts": 3}])
def test_an_archive_with_damaged_costs_is_refused(tmp_path: Path, row: dict[str, object]) -> None:
    facts = {"config": {}, "keys": {}, "stages": {"policy": row}, "paths": []}
    write_json(tmp_path / "replaced" / "1" / "archive.json", facts)
    with pytest.raises(RunFolderError, match=r"a stage's 'seconds' are no number, or its 'counts' no object"):
        Archive(tmp_path).facts(1)


def test_reading_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    # `read(n)` takes n bytes at once, whatever the file holds: 256 MiB here ended a run whose address space was limited.
    write_json(tmp_path / "a.json", {"a": 1})
    tracemalloc.start()
    try:
        assert read_json(tmp_path / "a.json") == {"a": 1}
        assert read_text(tmp_path / "a.json", "file", RunFolderError, most=1 << 28, remedy="").startswith("{")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("round", "2"), ("round", 0), ("device", ["a"]), ("device", {"model": "m"}), ("templates", ["x"]), ("stages", []),
        ("stages", {"policy": 3}), ("made_of", {"seeds": 1}), ("config", "none"), ("seed", None),
    ],
)  # fmt: skip
def test_a_value_of_another_type_in_run_json_is_named(tmp_path: Path, key: str, value: object) -> None:
    """A folder from elsewhere, whose hash is that of these values."""
    write_sealed(tmp_path / "run.json", {"schema": RUN_SCHEMA, "status": "finished", key: value})
    with pytest.raises(RunFolderError, match=rf"run\.json is damaged: {key}.* is .*; remove it and rerun"):
        read_run(tmp_path)
