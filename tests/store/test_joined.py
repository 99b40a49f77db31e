"""The run folder in a worker: one worker writes, until another one does in its place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfeval.errors import RunFolderError
from selfeval.records import Question, Split
from selfeval.store import RUN_SCHEMA, JoinedStore, RunStore, admit_writer, dismiss_writer, read_run
from selfeval.store.fence import FENCE

READING = {
    *("check_writable", "folder", "has_shard", "manifest", "metrics_path", "read", "read_dropped", "read_metrics"),
    *("read_shard", "shard_path", "shards"),
}
"""Methods of a run folder that write nothing. A new method belongs either here or to `JoinedStore`."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    found = RunStore(tmp_path / "run")
    found.update_run(schema=RUN_SCHEMA)
    yield found
    found.close()


def _files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


def test_every_writing_method_of_a_run_folder_has_a_rule_for_workers() -> None:
    public = {name for name, _ in inspect.getmembers(RunStore, inspect.isfunction) if not name.startswith("_")}
    assert public >= READING
    assert public - READING <= vars(JoinedStore).keys()


def _write(joined: JoinedStore) -> None:
    question = Question("q0", "How many?", Split.TRAIN, "self")
    joined.update_run(seed=3)
    joined.write_text(joined.root / "text", "text")
    joined.write_json(joined.root / "value.json", {})
    joined.write_shard("policy", 1, [question])
    joined.write_records("seeds.jsonl", [question])
    joined.add_metrics("policy", {"step": 1})
    joined.keep_metrics("policy", 1)


def test_the_writing_worker_writes_and_the_others_do_not(store: RunStore) -> None:
    before = _files(store.root)
    _write(JoinedStore(store.root))
    assert _files(store.root) == before
    _write(JoinedStore(store.root, admit_writer(store.root)))
    assert read_run(store.root)["seed"] == 3
    written = {"text", "value.json", "policy/shard-00001.jsonl", "seeds.jsonl", "metrics/policy.jsonl"}
    assert _files(store.root).keys() - before.keys() >= written


@pytest.mark.parametrize("name", ["begin", "finish", "put_back", "record_stage", "reopen", "set_aside", "write_dropped"])
def test_a_worker_leaves_the_states_of_the_stages_to_the_process_with_the_lock(name: str, store: RunStore) -> None:
    with pytest.raises(AssertionError, match="a worker only trains"):
        getattr(JoinedStore(store.root, admit_writer(store.root)), name)("policy")


WRITES = {
    "update_run": lambda joined: joined.update_run(seed=3),
    "write_text": lambda joined: joined.write_text(joined.root / "text", "text"),
    "write_json": lambda joined: joined.write_json(joined.root / "value.json", {}),
    "write_shard": lambda joined: joined.write_shard("policy", 1, []),
    "write_records": lambda joined: joined.write_records("seeds.jsonl", []),
    "add_metrics": lambda joined: joined.add_metrics("policy", {"step": 1}),
    "keep_metrics": lambda joined: joined.keep_metrics("policy", 0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_worker_that_was_replaced_writes_nothing(name: str, store: RunStore) -> None:
    first = JoinedStore(store.root, admit_writer(store.root))
    first.add_metrics("policy", {"step": 1})
    admit_writer(store.root)
    before = _files(store.root)
    with pytest.raises(RunFolderError, match=r"has ended or has replaced it\. Nothing was written; repeat"):
        WRITES[name](first)
    assert _files(store.root) == before


def test_a_worker_may_not_write_once_another_process_has_the_lock(store: RunStore) -> None:
    joined = JoinedStore(store.root, admit_writer(store.root))
    # As the system does when the process is killed: the lock is free, and the token is still there.
    store._lock._lock.release()
    joined.add_metrics("policy", {"step": 1})
    next_one = RunStore(store.root)
    with pytest.raises(RunFolderError, match="may not write"):
        joined.add_metrics("policy", {"step": 2})
    assert len(store.read_metrics("policy")) == 1
    next_one.close()


def test_no_token_is_left_after_a_training(store: RunStore) -> None:
    joined = JoinedStore(store.root, admit_writer(store.root))
    dismiss_writer(store.root)
    dismiss_writer(store.root)
    assert not (store.root / FENCE).exists()
    with pytest.raises(RunFolderError, match="may not write"):
        joined.update_run(seed=1)
