"""The connection to a server: the key, the headers, the rate, retries, and the errors that end a stage.

Retries with exponential backoff and the server's Retry-After are those of the client of OpenAI. Redirects are not followed,
because they would send the texts to a server that the user did not choose.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from functools import cached_property
from time import monotonic, sleep
from typing import Any, TypeVar

from selfeval.config import ServerConfig
from selfeval.errors import ConfigError, EndpointError, MissingPackageError
from selfeval.servers.failures import explain

__all__ = ["Connection", "Malformed", "check_server"]

R = TypeVar("R")


class Malformed(Exception):
    """A response with status 200 that does not have the form of the protocol."""


def check_server(settings: ServerConfig, section: str, work: str) -> None:
    """Check, without a request, that a server can be asked.

    Args:
        settings: settings of the server.
        section: dotted name of their section, for messages.
        work: the feature that asks, for the message if the client is not installed.

    Raises:
        ConfigError: the address, the model or the key is not set.
        MissingPackageError: the client is not installed.
    """
    for name in ("url", "model"):
        if not getattr(settings, name):
            example = "http://localhost:8000/v1" if name == "url" else "the name that the server lists"
            raise ConfigError(f"{section}.{name} is not set; set it, for example to {example}")
    _key(settings, section)
    _library(work)


def _key(settings: ServerConfig, section: str) -> str:
    variable = settings.key_variable
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ConfigError(f"{section}.key_variable names {variable}, which is not set; export {variable} with the API key")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        # The key is not shown.
        raise ConfigError(
            f"{variable} ({section}.key_variable) has a line break, a space or a character that is not ASCII, which no API key "
            f"has; export {variable} with the API key alone"
        )
    return key


def _library(work: str) -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingPackageError(work, "openai", extra="endpoint") from error
    return openai


_HEADERS = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
"""Names of the headers that a server gets, besides those with the library's prefix `x-stainless-`. The library would add those
of the environment, such as OPENAI_CUSTOM_HEADERS, which are meant for one service, to the requests to all servers."""


class _Headers:
    """Removes all headers of a request that are not needed, and sets the key.

    Args:
        key: the API key; if empty, a request has no Authorization header.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: Any) -> None:
        """Change the headers of a request."""
        for name in list(request.headers):
            if name.lower() not in _HEADERS and not name.lower().startswith("x-stainless-"):
                del request.headers[name]
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"


class _Pace:
    """Delays requests to a rate."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap, self._next, self._lock = 60 / per_minute if per_minute else 0.0, 0.0, threading.Lock()

    def __call__(self, request: object) -> None:
        """Wait until the next request may be sent."""
        with self._lock:
            now = monotonic()
            begin = max(now, self._next)
            self._next = begin + self._gap
        sleep(begin - now)


class Connection:
    """A connection to a server, which is opened by the first request.

    Args:
        settings: settings of the server.
        section: dotted name of the settings, for messages.
        work: the feature that asks, for messages.
        protocol: name of a valid response, for messages.
    """

    def __init__(self, settings: ServerConfig, section: str, work: str, protocol: str) -> None:
        check_server(settings, section, work)
        self.settings, self.section, self._work, self._protocol = settings, section, work, protocol
        self.key = _key(settings, section)
        self._pace = _Pace(settings.requests_per_minute)

    def send(
        self, call: Callable[[Any], str], parse: Callable[[str], R], instead: Callable[[Any, str], R | None] | None = None
    ) -> R:
        """Send a request. The library retries what HTTP shows to be wrong; a body of another form is retried here.

        Args:
            call: sends the request with the library's client, and returns the body of the response.
            parse: parses the body; raises `Malformed` if it has another form.
            instead: Optional. Returns the result that an error of the library stands for, given the key; None if there is none.

        Raises:
            EndpointError: the server refuses, cannot be reached after all retries, or returns bodies of another form.
        """
        for attempt in range(self.settings.retries + 1):
            try:
                return parse(call(self._client))
            except Malformed as error:
                problem = error
                sleep(min(0.1 * 2**attempt, 8.0) if attempt < self.settings.retries else 0)
            except Exception as error:
                if not isinstance(error, self._openai.OpenAIError):
                    raise
                if instead is not None and (result := instead(error, self.key)) is not None:
                    return result
                raise EndpointError(explain(error, self.settings, self.section, self.key)) from None
        raise EndpointError(
            f"{self.settings.url} returned no {self._protocol} in {self.settings.retries + 1} attempts ({problem}); check "
            f"{self.section}.url, which must be the base URL of an OpenAI-compatible API. The answers so far are kept"
        )

    def open(self) -> None:
        """Open the connection, so that several threads do not each open one."""
        _ = self._client

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if (client := self.__dict__.pop("_client", None)) is not None:
            client.close()

    @cached_property
    def _openai(self) -> Any:
        return _library(self._work)

    @cached_property
    def _client(self) -> Any:
        openai, settings, hooks = self._openai, self.settings, [_Headers(self.key), self._pace]
        return openai.OpenAI(
            base_url=settings.url,
            api_key=self.key or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"request": hooks}),
        )
