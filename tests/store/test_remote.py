"""Runs at a URL: what is uploaded can be resumed anywhere, at every moment, and nothing else is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from processes import TIMEOUT, environment
from remote_homes import FAST, S3Server, content, machine, new_url, s3_server, work
from selfeval.errors import InputError, MissingPackageError, RunFolderError, StorageError
from selfeval.runs.reader import RunReader
from selfeval.store import RunStore, write_json
from selfeval.store.changes import notify
from selfeval.store.remote import mirror
from selfeval.store.remote.index import INDEX, OBJECTS, read_index
from selfeval.store.remote.lease import LEASE, Lease
from selfeval.store.remote.mirror import Mirror, fetched, opened
from selfeval.store.remote.objects import Objects, open_objects
from selfeval.store.remote.places import home_of, run_path
from selfeval.store.remote.reaching import reach, without_secrets
from selfeval.store.remote.working_copy import WorkingCopy
from slow import slow

KINDS = ("memory", "file", "s3")
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as found:
        yield found


@pytest.fixture(params=KINDS)
def url(request: Any, tmp_path: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("server")
    return new_url(request.param, tmp_path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path) -> Iterator[None]:
    with machine(tmp_path / "here"):
        yield


def _expected(tmp_path: Path, shards: int = 4) -> dict[str, bytes]:
    """Content of an undisturbed run in a plain folder."""
    work(tmp_path / "plain", shards)
    return content(tmp_path / "plain")


# -- reading and writing ------------------------------------------------------------------------------------------------


def test_a_run_is_read_on_another_machine(url: str, tmp_path: Path) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 4)
    with machine(tmp_path / "there"):
        copy = fetched(url, timing=FAST)
    assert copy.is_relative_to(tmp_path / "there")
    assert copy.name == "shop"
    assert content(copy) == _expected(tmp_path)


def test_only_changed_files_are_fetched_again(server: S3Server, tmp_path: Path) -> None:
    url = new_url("s3", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 4)
    with machine(tmp_path / "there"):
        fetched(url, timing=FAST)
        with machine(tmp_path / "here"), opened(url, timing=FAST) as folder:
            RunStore(folder).close()
            write_json(folder / "report.json", {"schema": 1})
        server.requests.clear()
        copy = fetched(url, timing=FAST)
    gets = [path for method, path in server.requests if method == "GET" and f"/{OBJECTS}/" in path]
    assert len(gets) == 1, "report.json"
    assert json.loads((copy / "report.json").read_text("utf-8")) == {"schema": 1}


def test_a_removed_file_is_removed_from_the_copies_and_its_object_from_the_store(url: str, tmp_path: Path) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 3)
    with machine(tmp_path / "there"):
        fetched(url, timing=FAST)
    with opened(url, timing=FAST) as folder:
        (folder / "questions" / "shard-00001.jsonl").unlink()
    with machine(tmp_path / "there"):
        copy = fetched(url, timing=FAST)
    assert not (copy / "questions" / "shard-00001.jsonl").exists()
    index, _ = read_index(open_objects(url), url, 0.0) or pytest.fail("no index")
    assert set(open_objects(url).names(OBJECTS)) == {entry.object for entry in index.files.values()}


def test_a_moved_file_is_not_uploaded_again(server: S3Server, tmp_path: Path) -> None:
    url = new_url("s3", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 3)
    server.requests.clear()
    with opened(url, timing=FAST) as folder:
        shutil.move(folder / "roles", folder / "replaced" / "1" / "roles")
        write_json(folder / "note.json", 1)
    puts = [path for method, path in server.requests if method == "PUT" and f"/{OBJECTS}/" in path]
    assert len(puts) == 1, "note.json"


def _counted(server: S3Server) -> dict[str, int]:
    """Count the requests by method and kind of object; a list is a GET of the bucket."""
    counts = Counter[str]()
    for method, path in server.requests:
        name = path.rpartition("/")[2]
        kind = name if name in (INDEX, LEASE) else "object" if f"/{OBJECTS}/" in path else "list"
        counts[f"{method} {kind}"] += 1
    return dict(counts)


def test_the_number_of_requests_of_a_small_run(server: S3Server, tmp_path: Path) -> None:
    """A run without an upload before its end, and without a renewal of the lease; then a reader with nothing, and with all."""
    url, timing = new_url("s3", tmp_path), replace(FAST, beat=1000.0, interval=1000.0)
    open_objects(url).read(INDEX)  # connects
    server.requests.clear()
    with opened(url, timing=timing) as folder:
        work(folder, 5)
        contents = {path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert _counted(server) == {
        "PUT object": len(contents),  # the empty files of dropped records are one
        "PUT index.json": 1,
        "PUT lease.json": 3,  # taken, the question whether conditions are kept, released
        "GET lease.json": 1,
        "GET index.json": 2,  # the number of an earlier holder, the run to continue
        "GET list": 1,  # objects that nothing needs
    }
    with machine(tmp_path / "there"):
        for expected in ({"GET index.json": 1, "GET object": 0}, {"GET index.json": 1}):
            server.requests.clear()
            copy = fetched(url, timing=timing)
            files = sum(path.is_file() for path in copy.rglob("*"))
            if "GET object" in expected:
                expected["GET object"] = files
            assert _counted(server) == expected


def test_checkpoints_are_fetched_to_resume_and_not_to_read(url: str, tmp_path: Path) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        write_json(folder / "checkpoints" / "policy" / "state.json", 1)
    with machine(tmp_path / "there"):
        assert not (fetched(url, timing=FAST) / "checkpoints").exists()
        with opened(url, timing=FAST) as folder:
            assert (folder / "checkpoints" / "policy" / "state.json").is_file()


def test_locks_and_unfinished_files_are_not_uploaded(url: str, tmp_path: Path) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        for name in (".lock", "progress.json", ".run.json.part"):
            (folder / name).write_text("{}", encoding="utf-8")
        (folder / ".step.part").mkdir()
        (folder / ".step.part" / "state.json").write_text("{}", encoding="utf-8")
        (folder / "link").symlink_to("/etc/passwd")
    index, _ = read_index(open_objects(url), url, 0.0) or pytest.fail("no index")
    assert set(index.files) == set(_expected(tmp_path, 1)) | {"metrics/questions.jsonl"}


def test_a_run_that_does_not_exist_is_refused(url: str) -> None:
    with pytest.raises(RunFolderError, match=r"there is no run at .*shop"):
        fetched(url, timing=FAST)


def test_the_checkpoints_of_a_round_are_fetched_to_resume_and_not_to_read(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        write_json(folder / "rounds" / "02" / "note.json", 1)
        for name in ("checkpoints", "replaced"):
            write_json(folder / "rounds" / "02" / name / "1" / "state.json", 1)
    with machine(tmp_path / "there"):
        inner = fetched(url, timing=FAST) / "rounds" / "02"
        assert [path.name for path in inner.iterdir()] == ["note.json"]
        with opened(url, timing=FAST):
            assert (inner / "checkpoints" / "1" / "state.json").is_file()


def test_the_old_checkpoints_of_a_copy_are_not_in_the_run_that_another_machine_has_continued(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        write_json(folder / "checkpoints" / "policy" / "state.json", {"step": 10})
    with machine(tmp_path / "there"), opened(url, timing=FAST) as other:
        write_json(other / "checkpoints" / "policy" / "state.json", {"step": 20})
    fetched(url, timing=FAST)
    with machine(tmp_path / "there"), opened(url, timing=FAST) as other:
        shutil.rmtree(other / "checkpoints")
        work(other, 2)
    with opened(url, timing=FAST):
        assert not (folder / "checkpoints").exists()
    assert content(folder) == _expected(tmp_path, 2)


def test_a_reader_keeps_checkpoints_that_are_still_those_of_the_run(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        write_json(folder / "checkpoints" / "policy" / "state.json", {"step": 10})
    with machine(tmp_path / "there"), opened(url, timing=FAST) as other:
        work(other, 2)
    fetched(url, timing=FAST)
    assert (folder / "checkpoints" / "policy" / "state.json").is_file()
    with opened(url, timing=FAST):
        assert content(folder) == content(other)


# -- kills --------------------------------------------------------------------------------------------------------------


class _Unplugged(Objects):
    """Objects whose k-th write, and every later one, fails as if the network was gone."""

    def __init__(self, inner: Objects, allowed: int) -> None:
        self._inner, self.allowed, self.conditional = inner, allowed, inner.conditional

    def __getattribute__(self, name: str) -> Any:
        if name in ("_inner", "allowed", "conditional", "_write") or name.startswith("__"):
            return object.__getattribute__(self, name)
        found = getattr(self._inner, name)
        return self._write(found) if name in ("upload", "put_if", "remove") else found

    def _write(self, call: Any) -> Any:
        def write(*arguments: Any) -> Any:
            self.allowed -= 1
            if self.allowed < 0:
                raise ConnectionError("the network is gone")
            return call(*arguments)

        return write


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_can_be_resumed_after_a_failure_of_every_write(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The k-th write fails, for every k, so the state at the URL is that after k - 1 writes, as after a loss of the machine.

    On the emulator, which is slow, for every fifth k.
    """
    if kind == "s3":
        request.getfixturevalue("server")
    expected, failed = _expected(tmp_path, 3), 0
    for allowed in range(0, 1000, 5 if kind == "s3" else 1):
        url, plugged = new_url(kind, tmp_path), _Unplugged(open_objects("memory://none/x"), allowed)
        plugged._inner = open_objects(url)
        monkeypatch.setattr("selfeval.store.remote.mirror.open_objects", lambda url, found=plugged: found)
        try:
            with machine(tmp_path / f"lost-{allowed}"), opened(url, timing=FAST) as folder:
                work(folder, 2)
                time.sleep(0.03)  # for an upload before the end
                work(folder, 3)
        except StorageError as error:
            failed += "ConnectionError: the network is gone" in str(error)
        monkeypatch.undo()
        with machine(tmp_path / f"next-{allowed}"):
            _expire(url)
            with opened(url, timing=FAST) as folder:
                for name in ("run.json", "questions/manifest.json"):
                    if (folder / name).exists():
                        _check_whole(folder)
                work(folder, 3)
            assert content(folder) == expected
        if plugged.allowed >= 0:
            break
    assert failed > (3 if kind == "s3" else 8)


def _check_whole(folder: Path) -> None:
    """A manifest never names a file that is not there."""
    manifest = folder / "questions" / "manifest.json"
    if manifest.exists():
        assert all((folder / name).is_file() for name in json.loads(manifest.read_text("utf-8"))["files"])


def _expire(url: str) -> None:
    """Free the lease as if its expiry had passed."""
    objects = open_objects(url)
    if (found := objects.read_version(LEASE)) is not None:
        values = {**json.loads(found[0]), "renewed": 0.0}
        if values["holder"] is not None:
            values["holder"]["pid"] = 2**30  # a process of this machine that has ended
        assert objects.put_if(LEASE, json.dumps(values).encode(), found[1]) is not None


_KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from selfeval.store.remote.mirror import opened
from selfeval.store.remote.objects import open_objects
from dataclasses import replace
from remote_homes import FAST, work
timing = FAST if {wait} else replace(FAST, interval=1000.0)  # without a wait, nothing is uploaded
with opened({url!r}, timing=timing) as folder:
    work(folder, 3)
    while {wait} and b"manifest.json" not in (open_objects({url!r}).read("index.json") or b""):
        time.sleep(0.05)
    print("ready", flush=True)
    work(folder, 5)
    time.sleep(60)
"""


def _kill_a_writer(url: str, cache: Path, wait: float) -> None:
    tests = str(Path(__file__).parents[1])
    code = _KILLED.format(paths=[tests, str(Path(tests).parent / "src")], url=url, wait=wait)
    variables = {**environment(), **{n: v for n, v in os.environ.items() if n.startswith("AWS_")}, "SELFEVAL_CACHE": str(cache)}
    process = subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait(TIMEOUT)
    process.stdout.close()


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_killed_run_is_resumed_on_another_machine(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "s3":
        request.getfixturevalue("server")
    url = new_url(kind, tmp_path)
    _kill_a_writer(url, tmp_path / "killed", 1.0)
    shutil.rmtree(tmp_path / "killed")
    with opened(url, timing=FAST) as folder:
        assert (folder / "questions" / "manifest.json").is_file(), "uploaded before the kill"
        work(folder, 5)
    assert content(folder) == _expected(tmp_path, 5)


def test_a_killed_run_is_resumed_on_its_machine_with_results_that_were_not_uploaded(tmp_path: Path) -> None:
    url = new_url("file", tmp_path)
    _kill_a_writer(url, tmp_path / "here", 0.0)
    before = content(run_path(url))
    with opened(url, timing=FAST) as folder:
        assert content(folder) == before
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == before


def test_results_that_another_machine_has_superseded_are_kept_aside(tmp_path: Path) -> None:
    url, said = new_url("file", tmp_path), list[str]()
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
    _kill_a_writer(url, tmp_path / "killed", 0.0)
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
    with machine(tmp_path / "killed"):
        copy = fetched(url, said.append, FAST)
        assert content(copy) == _expected(tmp_path, 2)
        (aside,) = copy.parents[1].glob("superseded-*")
    assert "another machine has continued" in said[0]
    assert str(aside) in said[0]
    assert (aside / "questions" / "shard-00002.jsonl").is_file()


def test_results_are_kept_aside_also_after_earlier_ones_were_removed(tmp_path: Path) -> None:
    url = new_url("file", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
    home = home_of(folder)
    assert home is not None
    (home.cache / "superseded-2" / "roles").mkdir(parents=True)
    assert WorkingCopy(home).set_aside() == home.cache / "superseded-3"


def test_results_are_kept_if_two_processes_in_a_row_are_killed_at_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one after the index was replaced and before that was noted, the second one before it replaces the index."""
    url, said = new_url("memory", tmp_path), list[str]()
    home = home_of(run_path(url)) or pytest.fail("no home")
    mirror = Mirror(home, said.append, FAST)
    monkeypatch.setattr(WorkingCopy, "write_state", _fails_after(WorkingCopy.write_state, 1))
    work(home.copy, 1)
    with pytest.raises(StorageError, match="killed"):
        mirror.upload()
    monkeypatch.undo()
    _abandon(mirror)
    work(home.copy, 2)
    monkeypatch.setattr("selfeval.store.remote.mirror.claim", _fails_after(lambda *arguments: None, 0))
    with pytest.raises(StorageError, match="killed"):
        Mirror(home, said.append, FAST)
    monkeypatch.undo()
    _expire(url)
    with opened(url, said.append, FAST) as folder:
        assert content(folder) == _expected(tmp_path, 2)
    assert said == []


def _fails_after(call: Any, allowed: int) -> Any:
    """Return the function, which raises from the call after `allowed` calls on."""
    calls = count(1)

    def limited(*arguments: Any, **named: Any) -> Any:
        if next(calls) > allowed:
            raise StorageError("killed")
        return call(*arguments, **named)

    return limited


def _abandon(mirror: Mirror) -> None:
    """Leave everything as a killed process does: the lease, and a copy that is ahead."""
    mirror._closing.set()
    mirror._wake.set()
    mirror._thread.join()
    mirror._lease._ended.set()
    mirror._lease._thread.join()
    mirror._copy.writing.release()
    _expire(mirror._home.url)


# -- other processes that write ------------------------------------------------------------------------------------------

_FILES = 150
_WORKER = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from selfeval.store import JoinedStore
from selfeval.store.fence import admit_writer
from selfeval.store.files import writing
root = Path({root!r})
store = JoinedStore(root, admit_writer(root))
step = 0
while not (root.parent / "stop").exists():
    step += 1
    with writing(root / "checkpoints" / "policy") as part:
        part.mkdir()
        for number in range({files}):
            (part / str(number)).write_text(str(step))
    store.add_metrics("policy", {{"step": step}})
    if step == 1:
        print("ready", flush=True)
    time.sleep(0.2)
print(step)
"""


def test_checkpoints_of_a_worker_are_uploaded_while_it_trains_and_each_as_a_whole(tmp_path: Path) -> None:
    """A second process replaces a folder of many files again and again, and this one is never notified."""
    url, tests = new_url("file", tmp_path), str(Path(__file__).parents[1])
    seen = set[str]()
    with opened(url, timing=replace(FAST, look=0.01)) as folder:
        work(folder, 1)
        code = _WORKER.format(paths=[tests, str(SRC)], root=str(folder), files=_FILES)
        worker = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        try:
            assert worker.stdout.readline() == "ready\n"
            while len(seen) < 5:
                seen |= _uploaded_steps(url)
        finally:
            (folder.parent / "stop").touch()
            last, _ = worker.communicate(timeout=TIMEOUT)
    assert _uploaded_steps(url) == {last.strip()}


def _uploaded_steps(url: str) -> set[str]:
    """Return the step of the uploaded checkpoint; empty if there is none, or if it was replaced while it was read."""
    objects = open_objects(url)
    index = (read_index(objects, url, 60.0) or pytest.fail("no index"))[0]
    files = [index.files.get(f"checkpoints/policy/{number}") for number in range(_FILES)]
    assert files == [None] * _FILES or None not in files
    names = {entry.object for entry in files if entry is not None}
    assert len(names) <= 1, "files of several steps"
    return {found.decode() for name in names if (found := objects.read(name)) is not None}


# -- a store that is away -----------------------------------------------------------------------------------------------


def test_a_run_whose_store_is_away_to_the_end_works_to_its_end_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, said = new_url("memory", tmp_path), list[str]()
    plugged = _Unplugged(open_objects(url), 30)
    monkeypatch.setattr("selfeval.store.remote.mirror.open_objects", lambda url: plugged)
    message = r"at memory://.*network is gone; nothing is lost: the results are in .*rerun the same command on this machine"
    with pytest.raises(StorageError, match=message), opened(url, said.append, FAST) as folder:  # noqa: PT012
        for count in range(1, 20):
            work(folder, count)
            time.sleep(0.02)
    assert content(folder) == _expected(tmp_path, 19)
    (warning,) = said
    assert "network is gone; the run continues, its results are in" in warning
    monkeypatch.undo()
    _expire(url)  # it could not be released, and this process still runs
    with opened(url, timing=FAST):
        pass
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == content(folder)


def _wait(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def _is_uploaded(url: str, path: str) -> bool:
    found = read_index(open_objects(url), url, 60.0)
    return found is not None and path in found[0].files


def test_uploads_continue_when_the_store_is_back(server: S3Server, tmp_path: Path) -> None:
    url, said = new_url("s3", tmp_path), list[str]()
    with opened(url, said.append, replace(FAST, look=0.1)) as folder:
        work(folder, 1)
        server.stop()
        work(folder, 2)
        _wait(lambda: bool(said))
        work(folder, 3)
        server.start()
        _wait(lambda: _is_uploaded(url, "questions/shard-00002.jsonl"))
        _wait(lambda: len(said) > 1)
    assert [text.partition(":")[0] for text in said] == ["warning", "uploads to s3"]
    assert "the run continues" in said[0]
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 3)


def test_a_run_that_another_machine_takes_over_while_the_store_is_away_ends(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    plugged = _Unplugged(open_objects(url), 1000)
    message = "another process has taken over"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunFolderError, match=message):  # noqa: PT012
        patch.setattr("selfeval.store.remote.mirror.open_objects", lambda url: plugged)
        with opened(url, timing=FAST) as folder:
            work(folder, 1)
            plugged.allowed = 0
            work(folder, 2)
            patch.undo()
            _expire(url)
            with machine(tmp_path / "there"), opened(url, timing=FAST) as other:
                work(other, 3)
            plugged.allowed = 1000
            _wait(lambda: _changes_are_refused(folder))
            work(folder, 4)
    with machine(tmp_path / "later"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 3)


def _changes_are_refused(folder: Path) -> bool:
    try:
        notify(folder / "run.json")
    except RunFolderError:
        return True
    return False


def test_new_credentials_are_used_after_the_old_ones_have_expired(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = secret\n"
    keys.write_text(text.format("first"), encoding="utf-8")
    open_objects("s3://bucket/x").reconnect()  # the other tests have used those of the environment
    url, said = new_url("s3", tmp_path), list[str]()
    try:
        with opened(url, said.append, replace(FAST, look=0.1)) as folder:
            work(folder, 1)
            server.expired = {"first"}
            work(folder, 2)
            _wait(lambda: bool(said))
            keys.write_text(text.format("second"), encoding="utf-8")
            _wait(lambda: len(said) > 1)
            work(folder, 3)
    finally:
        server.expired = set()
        monkeypatch.undo()
        open_objects("s3://bucket/x").reconnect()
    assert "ExpiredToken" in said[0] or "token has expired" in said[0]
    assert "work again" in said[1]
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 3)


_INTERRUPTED = """
import sys, time
from dataclasses import replace
sys.path[:0] = {paths!r}
from selfeval.store.remote.mirror import opened
from remote_homes import FAST, work
timing = replace(FAST, patience=300.0)
with opened({url!r}, print, timing) as folder:
    work(folder, 3)
    print("ready", flush=True)
    sys.stdin.readline()
    work(folder, 30)
    print("worked", flush=True)
    try:
        time.sleep(600)
    finally:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("fault", ["refused", "silent"])
def test_an_interrupted_command_whose_store_is_away_ends_within_seconds(fault: str, server: S3Server, tmp_path: Path) -> None:
    url, tests = new_url("s3", tmp_path), str(Path(__file__).parents[1])
    code = _INTERRUPTED.format(paths=[tests, str(SRC)], url=url)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), **pipes)
    try:
        assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
        if fault == "refused":
            server.stop()
        else:
            server.is_silent = True
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        assert process.stdout.readline() == "worked\n"  # type: ignore[union-attr]
        time.sleep(1.0)  # the upload has begun
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=TIMEOUT)
        seconds = time.monotonic() - begun
    finally:
        process.kill()
        server.is_silent = False
        if fault == "refused":
            server.start()
    assert f"the last results are not uploaded, they are only in {run_path(url)}: {url} does not answer" in out
    assert seconds < 20, "`Timing.hurry`, and the end of Python on a busy machine"
    assert content(run_path(url)) == _expected(tmp_path, 30)
    with opened(url, timing=FAST):  # taken over at once, because its process has ended
        pass
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 30)


def test_a_new_run_that_is_refused_leaves_nothing_at_its_url(url: str) -> None:
    with pytest.raises(InputError, match="a setting"), opened(url, timing=FAST):
        raise InputError("a setting")
    objects = open_objects(url)
    assert (objects.read(LEASE), objects.read(INDEX), objects.names(OBJECTS)) == (None, None, [])
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
    with pytest.raises(InputError, match="a setting"), opened(url, timing=FAST):
        raise InputError("a setting")
    assert json.loads(objects.read(LEASE) or b"")["epoch"] == 2


def test_an_interrupted_run_that_cannot_be_uploaded_names_its_only_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, said = new_url("memory", tmp_path), list[str]()
    plugged = _Unplugged(open_objects(url), 1000)
    monkeypatch.setattr("selfeval.store.remote.mirror.open_objects", lambda url: plugged)
    timing = replace(FAST, interval=60.0)  # uploaded at the end only
    with pytest.raises(KeyboardInterrupt), opened(url, said.append, timing) as folder:  # noqa: PT012
        work(folder, 3)
        plugged.allowed = 0
        raise KeyboardInterrupt
    (note,) = (text for text in said if "not uploaded" in text)
    assert str(folder) in note
    assert "does not answer" in note


def test_an_emptied_copy_does_not_empty_the_run(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
    with pytest.raises(StorageError, match="is empty, so nothing was uploaded"), opened(url, timing=FAST) as folder:  # noqa: PT012
        shutil.rmtree(folder)
        folder.mkdir()
    assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 2)


# -- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_object_is_refused(damage: str, url: str, tmp_path: Path) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
    objects = open_objects(url)
    index, _ = read_index(objects, url, 0.0) or pytest.fail("no index")
    name = index.files["questions/shard-00001.jsonl"].object
    data = objects.read(name) or b""
    if damage == "missing":
        objects.remove(name)
    else:
        objects.upload(name, data[:-3] if damage == "truncated" else data.replace(b"1", b"2"))
    expected = r"is missing, although the index" if damage == "missing" else r"questions/shard-00001.jsonl is damaged at .*shop"
    with machine(tmp_path / "there"), pytest.raises(RunFolderError, match=expected):
        fetched(url, timing=FAST)
    with machine(tmp_path / "there"):
        assert not run_path(url).exists() or content(run_path(url)) == {}


@pytest.mark.parametrize("name", [INDEX, LEASE])
def test_a_damaged_index_or_lease_is_refused(name: str, url: str) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
    objects = open_objects(url)
    objects.upload(name, (objects.read(name) or b"")[:-5])
    with pytest.raises(RunFolderError, match=f"{name} is damaged"), opened(url, timing=FAST):
        pass


def test_an_index_cannot_name_files_outside_of_the_run(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
    objects = open_objects(url)
    values = json.loads(objects.read(INDEX) or b"")
    del values["hash"]
    values["files"]["../../outside"] = values["files"].pop("run.json")
    from selfeval.store import fingerprint

    objects.upload(INDEX, json.dumps({**values, "hash": fingerprint(values)}).encode())
    with machine(tmp_path / "there"), pytest.raises(RunFolderError, match=r"it lists '../../outside'"):
        fetched(url, timing=FAST)


# -- the lease ----------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_with_the_holder(url: str, tmp_path: Path) -> None:
    message = rf"is in use by process {os.getpid()} on .*, started 20.*UTC; its last sign"
    with opened(url, timing=FAST), machine(tmp_path / "there"), pytest.raises(RunFolderError, match=message):
        Mirror(home_of(run_path(url)) or pytest.fail("no home"), print, FAST)
    with machine(tmp_path / "there"), opened(url, timing=FAST):
        pass


def test_the_lease_of_a_live_process_is_renewed_and_not_taken_over(url: str, tmp_path: Path) -> None:
    with opened(url, timing=FAST), machine(tmp_path / "there"):
        time.sleep(2 * FAST.expiry)
        with pytest.raises(RunFolderError, match="is in use by process"):
            Mirror(home_of(run_path(url)) or pytest.fail("no home"), print, FAST)


def test_a_clock_that_is_ahead_does_not_take_the_lease_of_a_live_process(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Lease(open_objects(url), url, FAST)
    real = time.time
    monkeypatch.setattr("selfeval.store.remote.lease.time.time", lambda: real() + 1000)
    # A renewal would carry the wrong clock too, so the holder's clock is put back where it writes.
    monkeypatch.setattr("selfeval.store.remote.lease._Record.renew", _renew_with(real))
    with pytest.raises(RunFolderError, match="is in use by process"):
        Lease(open_objects(url), url, FAST)
    held.release()


def _renew_with(clock: Any) -> Any:
    import uuid
    from dataclasses import replace

    return lambda record, **values: replace(record, renewed=clock(), id=uuid.uuid4().hex, **values)


_RACE = """
import sys, time
sys.path[:0] = {paths!r}
from dataclasses import replace
from selfeval.errors import RunFolderError
from selfeval.store.remote.lease import Lease
from selfeval.store.remote.objects import open_objects
from remote_homes import FAST
timing = replace(FAST, expiry=1000.0)  # on a busy machine, the second one may come late
objects = [open_objects(f"{{{url!r}}}-{{number}}") for number in range({rounds})]
objects[0].read("lease.json")
print("ready", flush=True)
start = float(sys.stdin.readline())
for number, found in enumerate(objects):
    time.sleep(max(0.0, start + number * {gap} - time.time()))
    try:
        Lease(found, "url", timing)._ended.set()
        print("won", flush=True)
    except RunFolderError:
        print("lost", flush=True)
"""


def _race(url: str, rounds: int, gap: float) -> list[tuple[str, str]]:
    """Let two processes try to take a lease at the same time, round after round."""
    tests = str(Path(__file__).parents[1])
    code = _RACE.format(paths=[tests, str(Path(tests).parent / "src")], url=url, rounds=rounds, gap=gap)
    variables = {**environment(), **{n: v for n, v in os.environ.items() if n.startswith("AWS_")}}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": variables}
    racers = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    start = time.time() + 0.3
    for racer in racers:
        racer.stdin.write(f"{start}\n")  # type: ignore[union-attr]
        racer.stdin.flush()  # type: ignore[union-attr]
    first, second = (racer.communicate(timeout=TIMEOUT)[0].split() for racer in racers)
    assert len(first) == len(second) == rounds
    return list(zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["file", slow("s3")])
def test_of_two_processes_exactly_one_gets_the_lease(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "s3":
        request.getfixturevalue("server")
    outcomes = _race(new_url(kind, tmp_path), 100, 0.2)
    assert [outcome for outcome in outcomes if sorted(outcome) != ["lost", "won"]] == []
    assert {outcome[0] for outcome in outcomes} == {"lost", "won"}, "each of both wins sometimes, so they did race"


def test_a_stale_lease_is_taken_over_by_exactly_one(url: str) -> None:
    objects = open_objects(url)
    holder = {"host": "elsewhere", "machine": "elsewhere 1 2", "pid": 1, "started": 1.0}
    for _ in range(10):
        before = objects.read_version(LEASE)
        values = {"epoch": 7, "holder": holder, "renewed": 0.0, "id": str(time.time())}
        assert objects.put_if(LEASE, json.dumps(values).encode(), None if before is None else before[1])
        taken, refused = list[Lease](), list[RunFolderError]()

        def take() -> None:
            try:
                taken.append(Lease(open_objects(url), url, FAST))  # noqa: B023
            except RunFolderError as error:
                refused.append(error)  # noqa: B023

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(taken), len(refused)) == (1, 3)
        assert taken[0].epoch == 8
        taken[0].release()


def test_a_process_of_another_machine_is_never_declared_dead_by_its_number(url: str) -> None:
    holder = {"host": "elsewhere", "machine": "elsewhere 1 2", "pid": 2**30, "started": 1.0}
    values = {"epoch": 1, "holder": holder, "renewed": time.time(), "id": "1"}
    open_objects(url).put_if(LEASE, json.dumps(values).encode(), None)
    with pytest.raises(RunFolderError, match=r"process 1073741824 on elsewhere.*rerun the same command in 1 seconds"):
        Lease(open_objects(url), url, FAST)


class _Deaf(Objects):
    """Objects in memory whose conditional writes arrive, while the answers are lost and reads fail if `is_deaf`.

    Attributes:
        uploaded: names of the objects that were uploaded.
    """

    settles = False

    def __init__(self, inner: Objects) -> None:
        super().__init__(inner._files, inner._root)
        self.inner, self.is_deaf, self.conditional, self.uploaded = inner, False, True, list[str]()

    def upload(self, name: str, data: bytes | Path) -> None:
        self.uploaded.append(name)
        super().upload(name, data)

    def read_version(self, name: str) -> tuple[bytes, str] | None:
        if self.is_deaf:
            raise ConnectionError("the network is gone")
        return self.inner.read_version(name)

    def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
        written = self.inner.put_if(name, data, version)
        if self.is_deaf:
            raise ConnectionError("the answer is lost")
        return written


def test_a_renewal_whose_answer_is_lost_does_not_lose_the_lease(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    objects = _Deaf(open_objects(url))
    lease = Lease(objects, url, replace(FAST, beat=1000.0))
    objects.is_deaf = True
    with pytest.raises(StorageError, match="the answer is lost"):
        lease.renew()
    objects.is_deaf = False
    lease.renew()
    lease.check()
    objects.is_deaf = True
    with pytest.raises(StorageError, match="the answer is lost"):
        lease.renew()
    objects.is_deaf = False
    lease.release()
    assert json.loads(objects.read(LEASE) or b"")["holder"] is None


def test_an_index_whose_answer_is_lost_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, said = new_url("memory", tmp_path), list[str]()
    objects = _Deaf(open_objects(url))
    monkeypatch.setattr("selfeval.store.remote.mirror.open_objects", lambda url: objects)
    with opened(url, said.append, replace(FAST, beat=1000.0, look=0.1)) as folder:
        work(folder, 1)
        objects.is_deaf = True
        _wait(lambda: bool(said))
        objects.is_deaf = False
        _wait(lambda: len(said) > 1)
        assert len(objects.uploaded) == len(set(objects.uploaded)), "no object twice"
        work(folder, 2)
    assert "the answer is lost" in said[0]
    assert "work again" in said[1]
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 2)


def test_the_number_of_the_holder_does_not_begin_again_if_the_lease_was_removed(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    for shards in (1, 2):
        with opened(url, timing=FAST) as folder:
            work(folder, shards)
    open_objects(url).remove(LEASE)
    lease = Lease(open_objects(url), url, FAST)
    lease.release()
    assert (lease.epoch, lease.taken_over) == (3, True)


def test_a_suspended_process_cannot_write_after_its_lease_was_taken_over(url: str, tmp_path: Path) -> None:
    with machine(tmp_path / "suspended"):
        mirror = Mirror(home_of(run_path(url)) or pytest.fail("no home"), print, FAST)
        mirror._lease._ended.set()  # no beat from now on, as in a suspended process
        work(run_path(url), 1)
        mirror.upload()
    mirror._lease._thread.join()
    _expire(url)
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
        with machine(tmp_path / "suspended"):
            work(run_path(url), 3)
            with pytest.raises(RunFolderError, match="another process has taken over"):
                mirror.upload()
    with machine(tmp_path / "suspended"), pytest.raises(RunFolderError, match="another process has taken over"):
        mirror.close()
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 2)


def test_a_store_that_ignores_conditions_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ignoring(Objects):
        conditional = True

        def put_if(self, name: str, data: bytes, version: str | None) -> str | None:
            self.upload(name, data)
            return str(hash(data))

    url, said = new_url("memory", tmp_path), list[str]()
    inner = open_objects(url)
    monkeypatch.setattr("selfeval.store.remote.mirror.open_objects", lambda url: Ignoring(inner._files, inner._root))
    with opened(url, said.append, FAST):
        pass
    assert "cannot be made conditional" in said[0]


def test_stores_without_conditional_writes_work_and_say_that_a_second_process_may_not_be_refused(tmp_path: Path) -> None:
    url, said = new_url("memory", tmp_path), list[str]()
    import fsspec

    inner = fsspec.filesystem("memory")
    plain = Objects(inner, f"/{tmp_path.name}/plain/shop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfeval.store.remote.mirror.open_objects", lambda url: plain)
        with opened(url, said.append, FAST) as folder:
            work(folder, 2)
        with machine(tmp_path / "there"):
            assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 2)
    assert "start one only" in said[0]


# -- places and messages ------------------------------------------------------------------------------------------------


def test_a_url_is_read_as_one_and_a_path_as_a_path(tmp_path: Path) -> None:
    assert run_path("runs/shop") == Path("runs/shop")
    copy = run_path("s3://bucket/runs/shop/")
    assert copy == run_path("s3://bucket/runs/shop")
    assert copy.name == "shop"
    assert run_path("s3://bucket/runs/shop/rounds/02") == copy / "rounds" / "02"
    assert run_path("s3://bucket/runs/other").parent != copy.parent
    found = home_of(copy / "rounds" / "02")
    assert found is not None
    assert found.url == "s3://bucket/runs/shop"
    assert home_of(tmp_path) is None


@pytest.mark.parametrize("name", ["staging", "url", "state.json", "fetching.lock", "writing.lock", "copy", "superseded-1"])
def test_a_run_may_have_the_name_of_a_file_of_the_cache(name: str, tmp_path: Path) -> None:
    url = f"{new_url('memory', tmp_path)}/{name}"
    with opened(url, timing=FAST) as folder:
        assert folder.name == name
        work(folder, 2)
        time.sleep(0.05)  # for an upload before the end
        work(folder, 3)
    assert content(folder) == _expected(tmp_path, 3)
    with machine(tmp_path / "there"):
        assert content(fetched(url, timing=FAST)) == _expected(tmp_path, 3)


def test_a_relative_cache_folder_of_the_system_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFEVAL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    path = run_path(new_url("memory", tmp_path))
    assert path.is_relative_to(tmp_path / "home" / ".cache" / "selfeval" / "runs")
    assert home_of(path) is not None
    monkeypatch.setenv("SELFEVAL_CACHE", str(tmp_path / "here"))


def test_a_path_of_the_cache_is_known_to_later_processes(tmp_path: Path) -> None:
    url = new_url("file", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
    lines = ("from pathlib import Path", "from selfeval.store.remote.places import home_of")
    code = "; ".join([*lines, f"print(home_of(Path({str(folder)!r})).url)"])
    variables = {
        **environment(),
        "SELFEVAL_CACHE": str(tmp_path / "here"),
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sftp://me:hunter2secret@host/runs/shop", "the URL has a password"),
        ("s3://bucket/runs/shop?token=hunter2secret", "a query, a fragment and :: are not supported"),
        ("s3://bucket", "has no path"),
        ("s3://bucket/runs/..", r"has the part \. or \.\."),
        ("s3://bucket/runs/.", r"has the part \. or \.\."),
        ("s3://bucket/runs/./rounds/02", r"has the part \. or \.\."),
    ],
)
def test_a_url_that_cannot_be_a_run_is_refused_without_its_secret(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_path(url)
    assert "hunter2secret" not in str(caught.value)


def test_secrets_of_the_environment_are_not_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2secret")
    assert without_secrets("denied for hunter2secret") == "denied for [AWS_SECRET_ACCESS_KEY]"

    def call() -> None:
        raise PermissionError("denied for hunter2secret")

    with pytest.raises(StorageError, match=r"cannot read at s3://b/x: PermissionError: denied for \[AWS_SECRET_ACCESS_KEY\]"):
        reach(call, "s3://b/x", "read")


def test_credentials_are_nowhere_in_the_copy_or_the_store(server: S3Server, tmp_path: Path) -> None:
    url = new_url("s3", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
    objects = open_objects(url)
    texts = [path.read_bytes() for path in folder.parents[1].rglob("*") if path.is_file()]
    texts += [objects.read(name) or b"" for name in (INDEX, LEASE, *objects.names(OBJECTS))]
    assert len(texts) > 20
    assert not any(b"test-secret-key" in text or b"test-key-id" in text for text in texts)


def test_a_call_is_repeated_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, left = list[float](), [ConnectionError("reset"), TimeoutError("slow"), OSError("503 slow down")]
    monkeypatch.setattr("selfeval.store.remote.reaching.threading.Event.wait", lambda event, seconds: waits.append(seconds))

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert reach(call, "s3://b/x", "read", patience=60) == "done"
    # Each wait is between one half and all of 0.5, 1 and 2 seconds.
    assert [0.5 * 2**n / 2 <= wait <= 0.5 * 2**n for n, wait in enumerate(waits)] == [True] * 3


def test_a_bug_is_not_taken_for_a_fault_of_the_network() -> None:
    with pytest.raises(ZeroDivisionError):
        reach(lambda: 1 / 0, "s3://b/x", "read", patience=60)


def test_a_missing_bucket_is_one_sentence(server: S3Server) -> None:
    message = r"at s3://nowhere/runs/shop: FileNotFoundError: .*bucket"
    with pytest.raises(StorageError, match=message), opened("s3://nowhere/runs/shop", timing=FAST):
        pass


@pytest.mark.parametrize("scheme", ["sftp", "smb", "ftp", "hdfs", "github", "unheard"])
def test_a_store_whose_writes_can_be_cut_is_refused_by_name(scheme: str) -> None:
    message = rf"a run cannot be kept at {scheme}://.*complete or absent \(memory://, file://, .*s3://.*or a folder"
    with pytest.raises(InputError, match=message), opened(f"{scheme}://host/runs/shop", timing=FAST):
        pass


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(url: str, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingPackageError, match=r"pip install 'self-evaluator\[s3\]'"):
        open_objects("s3://bucket/runs/shop")
    with pytest.raises(InputError, match="gs:// needs a package that is not installed"):
        open_objects("gs://bucket/runs/shop")


def test_a_reader_on_the_machine_of_the_run_sees_its_copy_as_it_is(url: str) -> None:
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
        write_json(folder / "report.json", {"schema": 1})
        assert fetched(url, timing=FAST) == folder
        assert (folder / "report.json").is_file()


def test_the_reader_of_a_round_opens_the_round(tmp_path: Path) -> None:
    url = new_url("memory", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        write_json(folder / "rounds" / "02" / "note.json", 2)
    assert (fetched(f"{url}/rounds/02", timing=FAST) / "note.json").is_file()
    with pytest.raises(RunFolderError, match="is not a run"):
        RunReader(fetched(f"{url}/rounds/02", timing=FAST))


# -- files that change --------------------------------------------------------------------------------------------------


def test_a_large_file_that_grows_during_its_upload_is_uploaded_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, real = new_url("file", tmp_path), Mirror._put
    monkeypatch.setattr(mirror, "_IN_MEMORY", 10)
    appended: list[str] = []

    def put(self: Mirror, name: str, data: Any, path: str) -> None:
        if path == "metrics/policy.jsonl" and len(appended) < 3:
            appended.append(path)
            with (folder / path).open("a") as file:
                file.write('{"step": 2}\n')
        real(self, name, data, path)

    with opened(url, timing=FAST) as folder:
        work(folder, 1)
        (folder / "metrics").mkdir(exist_ok=True)
        (folder / "metrics" / "policy.jsonl").write_text('{"step": 1}\n' * 9)
        monkeypatch.setattr(Mirror, "_put", put)
    assert appended
    with machine(tmp_path / "there"):
        there = fetched(url, timing=FAST)  # compares each file with its hash
    assert (there / "metrics" / "policy.jsonl").read_text() == (folder / "metrics" / "policy.jsonl").read_text()


def test_labels_that_are_saved_during_the_last_upload_are_uploaded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, real = new_url("file", tmp_path), Mirror._put

    def put(self: Mirror, name: str, data: Any, path: str) -> None:
        real(self, name, data, path)
        if self._closing.is_set() and not (folder / "labels.jsonl").exists():
            (folder / "labels.jsonl").write_text('{"a": 1}\n')

    monkeypatch.setattr(Mirror, "_put", put)
    with opened(url, timing=replace(FAST, interval=30.0)) as folder:
        work(folder, 1)
    with machine(tmp_path / "there"):
        assert (fetched(url, timing=FAST) / "labels.jsonl").read_text() == '{"a": 1}\n'


def test_vectors_of_a_search_are_kept_by_later_readers(tmp_path: Path) -> None:
    url = new_url("file", tmp_path)
    with opened(url, timing=FAST) as folder:
        work(folder, 1)
    with machine(tmp_path / "there"):
        copy = fetched(url, timing=FAST)
        (copy / "embeddings").mkdir()
        (copy / "embeddings" / "x.safetensors").write_text("vectors")
    with opened(url, timing=FAST) as folder:
        work(folder, 2)
    with machine(tmp_path / "there"):
        assert fetched(url, timing=FAST) == copy
    assert (copy / "questions" / "shard-00001.jsonl").is_file()
    assert (copy / "embeddings" / "x.safetensors").read_text() == "vectors"
