"""Host names, tokens, and the options that open the server to others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse
from typer.testing import CliRunner

from processes import selfeval
from selfeval.cli import server_options
from selfeval.cli.app import app
from selfeval.serve import gate
from selfeval.serve.gate import Access, Gate, is_loopback
from selfeval.serve.metrics import Metrics
from toy import ToyRun


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("127.0.0.1:8000", True),
        ("127.0.0.1", True),
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("192.168.0.1:8000", False),
        ("", False),
    ],
)
def test_a_server_on_loopback_accepts_names_of_this_machine(host: str, accepted: bool) -> None:
    assert Access(None, loopback=True).names_this_machine(host) is accepted
    assert Access(None, loopback=False).names_this_machine(host)


@pytest.mark.parametrize(
    ("header", "accepted"),
    [("Bearer secret", True), ("bearer secret", True), ("Bearer secre", False), ("Bearer secrets", False), ("secret", False)],
)
def test_the_token_is_the_whole_token(header: str, accepted: bool) -> None:
    assert Access("secret", loopback=True).allows({"authorization": header}) is accepted
    assert not Access("secret", loopback=True).allows({})


def test_addresses_of_other_machines_are_not_loopback() -> None:
    assert [host for host in ("0.0.0.0", "::", "example.org", "10.0.0.1") if is_loopback(host)] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no-token", "--host", "0.0.0.0"], "add --open-to-network if that is intended"),
        (["--no-token", "--token", "x"], "got both --token and --no-token"),
        (["--token", "with space "], "printable ASCII characters"),
        (["--host", "256.1.1.1.nowhere.invalid"], "cannot listen on 256.1.1.1.nowhere.invalid"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_the_model_is_loaded(
    options: list[str], message: str, toy_run: ToyRun
) -> None:
    found = CliRunner().invoke(app, ["serve", str(toy_run.folder), *options])
    assert found.exit_code == 2
    assert message in found.stderr


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, toy_run: ToyRun) -> None:
    monkeypatch.setattr(server_options, "find_spec", lambda name: None if name == "prometheus_client" else object())
    found = CliRunner().invoke(app, ["serve", str(toy_run.folder)])
    assert found.exit_code == 2
    assert "needs the package prometheus-client; install it with: pip install 'self-evaluator[serve]'" in found.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    found = selfeval("serve", str(tmp_path))
    assert found.returncode == 2
    assert "Error:" in found.stderr


def test_a_stream_ends_if_its_client_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_STALLED_SECONDS", 0.05)
    closed = []

    async def lines() -> Any:
        try:
            while True:
                yield "data"
        finally:
            closed.append(True)

    async def read() -> None:
        worker: Any = None
        found = Gate(StreamingResponse(lines()), Access(None, loopback=False), 100, Metrics(worker))
        never = asyncio.Event()

        async def receive() -> Any:
            await never.wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await never.wait()

        scope = {"type": "http", "path": "/v1/completions", "headers": [], "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await asyncio.wait_for(found(scope, receive, send), 10)
        await asyncio.sleep(0.05)  # the generator is closed by the loop
        assert found.active == 0

    asyncio.run(read())
    assert closed
