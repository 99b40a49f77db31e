"""Limits, admission, errors and counters of the server, on an application in this process."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from selfeval.errors import InputError, RunFolderError, StorageError
from selfeval.prompt import Prompt
from selfeval.serve.api_errors import ApiError, api_error_from
from selfeval.serve.app import make_app
from selfeval.serve.gate import Access
from selfeval.serve.limits import Limits
from selfeval.serve.metrics import Metrics
from selfeval.serve.process import Application
from selfeval.serve.served_run import ServedRun
from selfeval.serve.service import Service
from selfeval.serve.worker import Worker
from served import QUESTION, chat
from toy import ToyRun

SCORES = {"question": QUESTION, "replies": ["3 + 2 = 5. The answer is 5."]}
EMBEDDING = {"model": "base", "input": "Tom"}
LONG: dict[str, Any] = {"model": "base", "prompt": "Tom", "temperature": 2, "seed": 0}
"""Random tokens rarely end a reply."""


@pytest.fixture(scope="module")
def run(toy_run: ToyRun) -> ServedRun:
    return ServedRun.load(toy_run.folder)


@pytest.fixture(scope="module")
def service(run: ServedRun) -> Iterator[Service]:
    found = serviced(run, Limits())
    found.worker.start()
    yield found
    found.worker.stop(timeout=10)


def serviced(run: ServedRun, limits: Limits) -> Service:
    worker = Worker(run, limits)
    return Service(run, worker, limits, Metrics(worker))


def app_of(service: Service) -> Application:
    return make_app(service, Access(None, loopback=False))


def post(service: Service, path: str, body: dict[str, Any]) -> httpx.Response:
    async def posted() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(f"/v1/{path}", json=body, timeout=60)

    return asyncio.run(posted())


def tokens(service: Service, kind: str) -> float:
    value: float = service.metrics.tokens.labels(kind)._value.get()
    return value


# -- limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "most", "expected"),
    [(40, 1024, 40), (40, 30, 30), (None, 30, 30), (1000, 1024, 512 - 3), (None, 1024, 512 - 3)],
)
def test_the_default_limit_is_that_of_the_run_the_server_and_the_context(
    limit: int | None, most: int, expected: int, run: ServedRun
) -> None:
    service = serviced(replace(run, reply_limit=limit), Limits(reply_tokens=most))
    assert service.reply_tokens("prompt", Prompt((1, 2, 3)), None) == expected


def test_a_long_prompt_does_not_shorten_the_reply_to_another(service: Service) -> None:
    """The context of 512 has room for 4 tokens after the first prompt."""
    prompts = [[5] * 508, [5, 6]]
    both = post(service, "completions", {**LONG, "prompt": prompts, "n": 4}).json()["choices"]
    alone = post(service, "completions", {**LONG, "prompt": prompts[1], "n": 4}).json()
    assert alone["usage"]["completion_tokens"] > 4 * 4
    assert [choice["text"] for choice in both[4:]] == [choice["text"] for choice in alone["choices"]]


def test_an_idle_server_without_a_queue_scores(run: ServedRun) -> None:
    service = serviced(run, Limits(queue=0))
    with service.admitted(scorings=1), pytest.raises(ApiError, match="the queue is full"), service.admitted(scorings=1):
        pass
    with service.admitted(rows=8), pytest.raises(ApiError, match="the queue is full"), service.admitted(rows=1):
        pass


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", chat("x" * 1_000_000)),
        ("completions", {"model": "base", "prompt": ["x", "x" * 1_000_000]}),
        ("embeddings", {"model": "base", "input": "x" * 1_000_000}),
        ("score", {"question": "x" * 1_000_000, "replies": ["x"]}),
        ("score", {"question": "x", "replies": ["x" * 1_000_000]}),
    ],
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    path: str, body: dict[str, Any], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "tokenized", None)
    found = post(service, path, body)
    assert found.status_code == 400
    assert "has 1,000,000 characters, but 2,048 tokens (--max-prompt-tokens) have at most" in found.json()["error"]["message"]


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RunFolderError, StorageError])
def test_an_error_of_the_servers_files_shows_no_path(kind: type[InputError], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        found = api_error_from(kind("/srv/run/replies/limit.json is damaged"))
    assert (found.status, "/srv" in found.message) == (500, False)
    assert "/srv/run/replies/limit.json is damaged" in caplog.text


# -- figures ------------------------------------------------------------------------------------------------------------


def test_scores_of_replies_are_rounded_as_those_of_the_evaluator(service: Service) -> None:
    found = post(service, "chat/completions", chat(n=2, best_of=3, seed=1)).json()["choices"]
    values = [value for choice in found for value in (choice["score"], choice["confidence"])]
    assert values == [round(value, 6) for value in values]


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [("score", SCORES, "scored"), ("embeddings", EMBEDDING, "embedded"), ("completions", LONG, "prompt")],
)
def test_tokens_of_refused_requests_are_not_counted(path: str, body: dict[str, Any], kind: str, service: Service) -> None:
    before = tokens(service, kind)
    with service.admitted(rows=service.limits.rows, scorings=service.limits.scorings):
        assert post(service, path, body).status_code == 429
    assert tokens(service, kind) == before
    assert post(service, path, body).status_code == 200
    assert tokens(service, kind) > before


def test_tokens_of_a_stream_are_counted_when_its_client_has_left(service: Service) -> None:
    before = tokens(service, "completion")

    async def left() -> None:
        begun = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps({**LONG, "stream": True, "max_tokens": 400, "n": 4}).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and message["body"]:
                begun.set()

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
        await app_of(service)({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)
        await asyncio.sleep(0.2)  # the generator is closed by the loop

    asyncio.run(left())
    assert 0 < tokens(service, "completion") - before < 200
    assert service.rows == 0
