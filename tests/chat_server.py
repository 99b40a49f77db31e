"""A chat-completions server on this machine: real HTTP, with answers that a test decides."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["NOW", "Asked", "ChatServer", "Response", "chat_server", "completion", "failure"]

NOW = {"retry-after-ms": "1"}
"""Header that makes the client retry at once."""


@dataclass(frozen=True)
class Asked:
    """A request: its body, and its headers by lower-case name."""

    body: Mapping[str, Any]
    headers: Mapping[str, str]
    path: str
    number: int

    @property
    def prompt(self) -> str:
        return "\n".join(message["content"] for message in self.body["messages"])


@dataclass(frozen=True)
class Response:
    """A response; `cut` sends only so many bytes of the body that it announces."""

    body: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    seconds: float = 0.0


def completion(
    text: str | None,
    *,
    top: Mapping[str, float] | None = None,
    finish: str = "stop",
    usage: tuple[int, int] = (100, 10),
    **message: Any,
) -> Response:
    """An answer. `top`: probabilities of the likeliest tokens at its last token; each earlier character is a token."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    if top is not None and text:
        last = max(top, key=lambda token: (text.endswith(token), len(token)))
        before = [{"token": c, "logprob": -0.1, "top_logprobs": []} for c in text.removesuffix(last)]
        alternatives = [{"token": token, "logprob": math.log(p)} for token, p in top.items()]
        at = {"token": last, "logprob": math.log(top[last]), "top_logprobs": alternatives}
        choice["logprobs"] = {"content": [*before, at]}
    values = {"object": "chat.completion", "id": "1", "created": 0, "model": "m", "choices": [choice]}
    return Response(json.dumps({**values, "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}))


def failure(status: int, message: str = "no", code: str | None = None, headers: Mapping[str, str] = NOW) -> Response:
    return Response(json.dumps({"error": {"message": message, "code": code, "type": "t"}}), status, headers)


class ChatServer:
    """The requests so far, and the address."""

    def __init__(self, answer: Callable[[Asked], Response]) -> None:
        self.answer, self.most_in_flight, self.url = answer, 0, ""
        self.asked: list[Asked] = []
        self._lock, self._in_flight = threading.Lock(), 0

    def respond(self, body: Mapping[str, Any], headers: Mapping[str, str], path: str) -> Response:
        with self._lock:
            asked = Asked(body, headers, path, len(self.asked))
            self.asked.append(asked)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            response = self.answer(asked)
            time.sleep(response.seconds)
            return response
        finally:
            with self._lock:
                self._in_flight -= 1


@contextmanager
def chat_server(answer: Callable[[Asked], Response]) -> Iterator[ChatServer]:
    """Serve on a free port of this machine until the block ends."""
    served = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            response = served.respond(body, {name.lower(): value for name, value in self.headers.items()}, self.path)
            data = response.body.encode()
            self.send_response(response.status)
            for name, value in {"content-type": "application/json", **response.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            try:
                self.wfile.write(data if response.cut is None else data[: response.cut])
            except OSError:  # a client that ran out of time has left
                self.close_connection = True
            if response.cut is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
