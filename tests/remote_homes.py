"""URLs of runs for tests: memory, local files and an emulator of S3, and runs on "other machines"."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from selfeval.records import Question, Split
from selfeval.store import RunStore
from selfeval.store.remote.lease import Timing

__all__ = ["FAST", "S3Server", "content", "machine", "new_url", "s3_server", "work"]

FAST = Timing(beat=0.2, expiry=0.6, watch=0.5, settle=0.05, interval=0.02, patience=0.0, hurry=2.0)
"""Short times; a failing call is not repeated."""


class S3Server:
    """An emulator of S3 in this process, with a bucket named `bucket`.

    It answers one request at a time: moto compares a condition and writes in two steps, and S3 does so in one.

    Attributes:
        requests: method and path of every request that was answered.
        is_silent: whether requests get no answer, until it is False again.
        expired: ids of access keys that are refused.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._backend, self.requests = DomainDispatcherApplication(create_backend_app), list[tuple[str, str]]()
        self._alone, self.is_silent, self.expired = threading.Lock(), False, set[str]()
        self._port = 0
        self.start()

    def start(self) -> None:
        """Listen, after `stop` at the same address and with the same objects."""
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log_request(self, *arguments: Any, **named: Any) -> None:
                pass

        self._server = make_server("127.0.0.1", self._port, self._answer, threaded=True, request_handler=Quiet)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environment: dict[str, Any], start: Any) -> Any:
        while self.is_silent:
            time.sleep(0.05)
        if any(f"Credential={key}/" in environment.get("HTTP_AUTHORIZATION", "") for key in self.expired):
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"]
        with self._alone:
            self.requests.append((environment["REQUEST_METHOD"], environment["PATH_INFO"]))
            return list(self._backend(environment, start))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process finds the server; it repeats no failing request by itself."""
        keys = {"AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "test-secret-key", "AWS_MAX_ATTEMPTS": "1"}
        return {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": self.address}

    def create_bucket(self) -> None:
        import fsspec

        fsspec.filesystem("s3").call_s3("create_bucket", Bucket="bucket")


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Run the emulator, with the environment of this process set to it. Skip the test if a package is missing."""
    pytest.importorskip("moto", reason="the emulator of S3 is not installed: pip install 'moto[s3,server]'")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'self-evaluator[s3]'")
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.create_bucket()
        try:
            yield server
        finally:
            import fsspec

            fsspec.filesystem("s3").clear_instance_cache()
            server.stop()


def new_url(kind: str, folder: Path) -> str:
    """Return the URL of a new run."""
    base = {"memory": "memory://bucket", "file": f"file://{folder}/bucket", "s3": "s3://bucket"}[kind]
    return f"{base}/{uuid.uuid4().hex}/shop"


@contextmanager
def machine(folder: Path) -> Iterator[None]:
    """Work as on a machine whose cache is `folder`."""
    before = os.environ.get("SELFEVAL_CACHE")
    os.environ["SELFEVAL_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("SELFEVAL_CACHE")
        if before is not None:
            os.environ["SELFEVAL_CACHE"] = before


def work(root: Path, shards: int) -> None:
    """Do what a stage does, resuming it: shards that are there are kept, and a folder is replaced as a whole."""
    store = RunStore(root)
    try:
        store.update_run(schema=4, status="running")
        store.begin("questions", "key")
        for index in range(shards):
            if not store.has_shard("questions", index, drops=True):
                store.write_shard("questions", index, [Question(f"q{index}", f"Question {index}?", Split.TRAIN, "self")], [])
                store.add_metrics("questions", {"step": index})
        store.write_text(root / "roles" / "policy" / "weights.txt", "w" * shards)
        store.finish("questions", "key", {"questions": shards})
        store.update_run(status="finished")
    finally:
        store.close()


def content(root: Path) -> dict[str, bytes]:
    """Return the files of a run except metrics, whose lines a killed run may repeat, and its lock."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    left_out = (".lock", "questions.jsonl")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files if path.name not in left_out}
