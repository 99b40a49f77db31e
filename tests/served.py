"""A real server process on a run, for tests of `selfeval serve`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from processes import TIMEOUT, Process, start

__all__ = ["QUESTION", "TOKEN", "Served", "chat", "serving", "wait_for"]

QUESTION = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
TOKEN = "a-token-for-tests"


def wait_for(condition: Any, seconds: float = 60) -> Any:
    """Return the first true result of a function that is called again and again."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.02)
    return found


def chat(content: str = QUESTION, **options: Any) -> dict[str, Any]:
    """The body of a chat request to the policy."""
    return {"model": "policy", "messages": [{"role": "user", "content": content}], **options}


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Attributes:
        url: its address, without /v1.
        process: the process.
        http: a client that sends the token.
    """

    url: str
    process: Process
    http: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/health").json()
        return found

    def is_idle(self) -> bool:
        found = self.health()
        return (found["running"], found["waiting"], found["scoring"], found["active_requests"]) == (0, 0, 0, 0)

    def end(self) -> int:
        """Wait for the end of the process; return its exit code."""
        self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@contextmanager
def serving(run: Path, *options: str, token: str = TOKEN) -> Iterator[Served]:
    """Serve a run until the block ends."""
    process = start(["serve", str(run), "--port", "0", *(["--token", token] if token else []), *options])
    assert isinstance(process, Process), "the tests of the server need the fork server"

    def address() -> str:
        assert process.returncode is None, process.communicate()[1]
        found = re.search(r"at (http://\S+)/v1", process.written())
        return found[1] if found else ""

    try:
        url = wait_for(address, TIMEOUT)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as http:
            yield Served(url, process, http)
    finally:
        process.kill()
        process.communicate()
