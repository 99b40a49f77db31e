"""The client of a server: requests in parallel, within limits of rate, time and cost; every answer is kept on disk.

Retries with exponential backoff and the server's Retry-After are those of the client of OpenAI. Redirects are not followed,
because they would send the texts to a server that the user did not choose.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, cached_property
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from selfeval.config import EndpointConfig, JudgeRole
from selfeval.errors import ConfigError, EndpointError, MissingPackageError
from selfeval.judging.server.cache import AnswerCache
from selfeval.judging.server.chat import Answer, ChatRequest
from selfeval.judging.server.failures import answer_instead, explain
from selfeval.judging.server.parsing import Malformed, parse_answer
from selfeval.judging.server.spending import spending_of

__all__ = ["Client", "check_endpoint", "client_of"]


def check_endpoint(settings: EndpointConfig, section: str) -> None:
    """Check, without a request, that a server can be asked.

    Args:
        settings: settings of the server.
        section: dotted name of their section, for messages.

    Raises:
        ConfigError: the address, the model or the key is not set.
        MissingPackageError: the client is not installed.
    """
    for name in ("url", "model"):
        if not getattr(settings, name):
            example = "http://localhost:8000/v1" if name == "url" else "the name that the server lists"
            raise ConfigError(f"{section}.{name} is not set; set it, for example to {example}")
    _key(settings, section)
    _library()


def _key(settings: EndpointConfig, section: str) -> str:
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


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingPackageError("the endpoint judge", "openai", extra="endpoint") from error
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


class Client:
    """Asks a server, and keeps its answers.

    Args:
        settings: settings of the server.
        answers: the kept answers.
        section: dotted name of the settings, for messages.
    """

    def __init__(self, settings: EndpointConfig, answers: AnswerCache, section: str) -> None:
        check_endpoint(settings, section)
        self.settings, self.answers, self.section = settings, answers, section
        self._key = _key(settings, section)
        self._pace = _Pace(settings.requests_per_minute)
        self._spent, self._lock = spending_of(answers), threading.Lock()

    def ask(self, requests: Sequence[ChatRequest], advance: Callable[[int], None] | None = None) -> list[Answer]:
        """Return one answer per request. Equal requests are asked once, and kept answers are not asked for again.

        Raises:
            EndpointError: the server refuses, cannot be reached after all retries, or the budget is spent. Requests in flight
                are completed first, and their answers are kept.
        """
        paths = {request: self.answers.path(self.settings, request) for request in requests}
        found = {request: kept for request, path in paths.items() if (kept := self.answers.read(path)) is not None}
        if advance is not None and found:
            advance(len(found))
        missing = {request: path for request, path in paths.items() if request not in found}
        try:
            for request, answer in self._answers(missing):
                found[request] = answer
                if advance is not None:
                    advance(1)
        finally:
            self._close()
        return [found[request] for request in requests]

    def _answers(self, missing: Mapping[ChatRequest, Path]) -> Iterator[tuple[ChatRequest, Answer]]:
        """Yield the answers as they come. After a failure nothing more is sent, and what was sent is waited for and kept."""
        failed = threading.Event()
        if missing:
            _ = self._connection  # made here, once, and not by several threads
        with ThreadPoolExecutor(self.settings.in_flight) as pool:
            asked = {pool.submit(self._ask, request, path, failed): request for request, path in missing.items()}
            try:
                for done in as_completed(asked):
                    if (answer := done.result()) is not None:
                        yield asked[done], answer
            except BaseException:
                failed.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: ChatRequest, path: Path, failed: threading.Event) -> Answer | None:
        """Return an answer; None if another request has failed, so that this one is not sent."""
        if failed.is_set():
            return None
        try:
            self._refuse_above_budget()
            answer = self._send(request)
        except BaseException:
            failed.set()  # here, because the next request begins before the main thread sees the failure
            raise
        # A prompt that does not fit is not kept, because a server can be started again with a longer context.
        if answer.ending != "no_room":
            self.answers.write(path, answer)
            with self._lock:
                self._spent = self._spent.plus(answer)
        return answer

    def _refuse_above_budget(self) -> None:
        settings, spent = self.settings, self._spent
        cost, tokens = spent.cost(settings), spent.read + spent.written
        if spent.uncounted and (settings.budget is not None or settings.budget_tokens is not None):
            name = "budget" if settings.budget is not None else "budget_tokens"
            raise EndpointError(
                f"{settings.url} does not say how many tokens an answer has ({spent.uncounted} of {spent.answers} answers), so "
                f"{self.section}.{name} cannot be kept; set {self.section}.{name} to none to continue without it"
            )
        if settings.budget is not None and cost is not None and cost >= settings.budget:
            self._stop("budget", f"{settings.budget:g}", f"{cost:.4g}")
        if settings.budget_tokens is not None and tokens >= settings.budget_tokens:
            self._stop("budget_tokens", f"{settings.budget_tokens:,}", f"{tokens:,} tokens")

    def _stop(self, name: str, limit: str, spent: str) -> None:
        raise EndpointError(
            f"{self.section}.{name} = {limit} is reached: the answers of {self.settings.model} in {self.answers.folder} cost "
            f"{spent}. They are kept; raise {self.section}.{name} (or set it to none) and rerun the same command to continue"
        )

    def _send(self, request: ChatRequest) -> Answer:
        """Send a request. The library retries what HTTP shows to be wrong; an answer that is no JSON is retried here."""
        for attempt in range(self.settings.retries + 1):
            try:
                return parse_answer(self._completion(request), request.labels)
            except Malformed as error:
                problem = error
                sleep(min(0.1 * 2**attempt, 8.0) if attempt < self.settings.retries else 0)
            except Exception as error:
                if not isinstance(error, self._openai.OpenAIError):
                    raise
                if (instead := answer_instead(error, self._key)) is not None:
                    return instead
                raise EndpointError(explain(error, self.settings, self.section, self._key)) from None
        raise EndpointError(
            f"{self.settings.url} returned no chat completion in {self.settings.retries + 1} attempts ({problem}); check "
            f"{self.section}.url, which must be the base URL of an OpenAI-compatible API. The answers so far are kept"
        )

    def _completion(self, request: ChatRequest) -> str:
        """Return the body of the response, which is parsed here: the library does not check what a server returns."""
        settings = self.settings
        parameters = request.parameters(settings.limit_parameter)
        completions = self._connection.chat.completions.with_raw_response
        raw = completions.create(model=settings.model, messages=request.messages, **parameters)
        return str(raw.text)

    def _close(self) -> None:
        if (connection := self.__dict__.pop("_connection", None)) is not None:
            connection.close()

    # -- the library ----------------------------------------------------------------------------------------------------

    @cached_property
    def _openai(self) -> Any:
        return _library()

    @cached_property
    def _connection(self) -> Any:
        openai, settings, hooks = self._openai, self.settings, [_Headers(self._key), self._pace]
        return openai.OpenAI(
            base_url=settings.url,
            api_key=self._key or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
            http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks={"request": hooks}),
        )


@cache
def client_of(settings: EndpointConfig, folder: Path, role: JudgeRole) -> Client:
    """Return the client of a server, of which there is one per process, so rate and budget hold for all shards.

    Args:
        settings: settings of the server.
        folder: folder of the answers.
        role: role of the judge that asks.
    """
    return Client(settings, AnswerCache(folder, role), "verdicts.endpoint" if role == "judge" else "evaluation.referee")
