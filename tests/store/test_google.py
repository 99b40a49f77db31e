"""Runs in Google Cloud Storage: gcsfs against a server in this process that answers as the JSON API is documented to.

https://cloud.google.com/storage/docs/json_api/v1/objects and https://cloud.google.com/storage/docs/request-preconditions
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest

from remote_homes import FAST, content, machine, work
from selfeval.errors import RunFolderError
from selfeval.store.remote.index import OBJECTS
from selfeval.store.remote.lease import Lease
from selfeval.store.remote.mirror import fetched, opened
from selfeval.store.remote.objects import Objects, open_objects

pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install gcsfs")

URL = "gs://bucket/runs/shop"


@dataclass
class _Bucket:
    """A bucket by WSGI: the requests that this package makes through gcsfs."""

    found: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: count(1700000000000001))
    alone: Any = field(default_factory=threading.Lock)

    def __call__(self, environment: dict[str, Any], start: Any) -> list[bytes]:
        path, query = environment["RAW_URI"].partition("?")[0], parse_qs(environment["QUERY_STRING"])
        body = environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        name = unquote(match[1]) if (match := re.search(r"/b/bucket/o/(.+)$", path)) else query.get("name", [""])[0]
        with self.alone:
            status, headers, answer = self._answer(environment["REQUEST_METHOD"], path, name, query, body)
        start(f"{status} ", [("Content-Type", "application/octet-stream"), *headers.items()])
        return [answer]

    def _answer(
        self, method: str, path: str, name: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        if method == "POST":
            return self._write(name, query, body)
        if method == "GET" and path.endswith("/b/bucket/o"):
            names = [found for found in self.found if found.startswith(query["prefix"][0])]
            return 200, {}, json.dumps({"kind": "storage#objects", "items": [self._facts(found) for found in names]}).encode()
        if name not in self.found:
            return 404, {}, b"{}"
        if method == "DELETE":
            del self.found[name]
            return 204, {}, b""
        data, generation = self.found[name]
        if "/download/" in path or query.get("alt") == ["media"]:
            return 200, {"X-Goog-Generation": str(generation)}, data
        return 200, {}, json.dumps(self._facts(name)).encode()

    def _write(self, name: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if query["uploadType"] == ["multipart"]:
            about, body = body.removesuffix(b"\n--==0==--").split(b"\n\n", 2)[1:]
            name = json.loads(about.partition(b"\n--==0==")[0])["name"]
        if (wanted := query.get("ifGenerationMatch")) and int(wanted[0]) != self.found.get(name, (b"", 0))[1]:
            return 412, {}, b'{"error": {"code": 412, "message": "At least one of the pre-conditions did not hold."}}'
        self.found[name] = (body, next(self.numbers))
        return 200, {}, json.dumps(self._facts(name)).encode()

    def _facts(self, name: str) -> dict[str, str]:
        data, generation = self.found[name]
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        return {"name": name, "bucket": "bucket", "size": str(len(data)), "generation": str(generation), **times}


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Bucket]:
    """Serve an empty bucket, and work as on a machine with an empty cache."""
    from werkzeug.serving import make_server

    found = _Bucket()
    server = make_server("127.0.0.1", 0, found, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # no search for the credentials of a machine
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    with machine(tmp_path / "here"):
        yield found
    server.shutdown()
    server.server_close()
    import fsspec

    fsspec.filesystem("gs").clear_instance_cache()


def test_a_run_is_continued_on_another_machine(tmp_path: Path) -> None:
    said = list[str]()
    with opened(URL, said.append, FAST) as folder:
        work(folder, 2)
    with machine(tmp_path / "there"), opened(URL, said.append, FAST) as folder:
        work(folder, 4)
    work(tmp_path / "plain", 4)
    assert content(fetched(URL, timing=FAST)) == content(tmp_path / "plain")
    assert not any("warning" in text for text in said), "writes are conditional"


def test_a_second_process_is_refused_by_the_generation_of_the_lease(bucket: _Bucket) -> None:
    lease = Lease(open_objects(URL), URL, FAST)
    assert lease.excludes
    with pytest.raises(RunFolderError, match="is in use by process"):
        Lease(open_objects(URL), URL, FAST)
    lease.release()
    assert Lease(open_objects(URL), URL, FAST).epoch == 2


def test_a_write_needs_the_generation_that_was_read() -> None:
    objects = open_objects(URL)
    first = objects.put_if("index.json", b"first", None)
    assert first is not None
    assert objects.put_if("index.json", b"other", None) is None
    assert objects.read_version("index.json") == (b"first", first)
    second = objects.put_if("index.json", b"second", first)
    assert objects.put_if("index.json", b"other", first) is None
    assert objects.read_version("index.json") == (b"second", second)


def test_names_and_removal(bucket: _Bucket, tmp_path: Path) -> None:
    objects: Objects = open_objects(URL)
    (tmp_path / "large").write_bytes(os.urandom(1000))
    objects.upload(f"{OBJECTS}/one", b"1")
    objects.upload(f"{OBJECTS}/two", tmp_path / "large")
    assert sorted(objects.names(OBJECTS)) == [f"{OBJECTS}/one", f"{OBJECTS}/two"]
    assert objects.download(f"{OBJECTS}/two", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "large").read_bytes()
    objects.remove(f"{OBJECTS}/one")
    assert list(bucket.found) == ["runs/shop/objects/two"]
