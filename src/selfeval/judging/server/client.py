"""The client of a server: requests in parallel, within limits of rate, time and cost; every answer is kept on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

from selfeval.config import EndpointConfig, JudgeRole
from selfeval.errors import EndpointError
from selfeval.judging.server.cache import AnswerCache
from selfeval.judging.server.chat import Answer, ChatRequest
from selfeval.judging.server.failures import answer_instead
from selfeval.judging.server.parsing import parse_answer
from selfeval.judging.server.spending import spending_of
from selfeval.servers.connection import Connection, check_server

__all__ = ["Client", "check_endpoint", "client_of"]

_WORK = "the endpoint judge"


def check_endpoint(settings: EndpointConfig, section: str) -> None:
    """Check, without a request, that a server can be asked; see `servers.connection.check_server`.

    Args:
        settings: settings of the server.
        section: dotted name of their section, for messages.
    """
    check_server(settings, section, _WORK)


class Client:
    """Asks a server, and keeps its answers.

    Args:
        settings: settings of the server.
        answers: the kept answers.
        section: dotted name of the settings, for messages.
    """

    def __init__(self, settings: EndpointConfig, answers: AnswerCache, section: str) -> None:
        self.settings, self.answers, self.section = settings, answers, section
        self._connection = Connection(settings, section, _WORK, "chat completion")
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
            self._connection.close()
        return [found[request] for request in requests]

    def _answers(self, missing: Mapping[ChatRequest, Path]) -> Iterator[tuple[ChatRequest, Answer]]:
        """Yield the answers as they come. After a failure nothing more is sent, and what was sent is waited for and kept."""
        failed = threading.Event()
        if missing:
            self._connection.open()  # here, once, and not by several threads
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
        def completion(client: Any) -> str:
            # Parsed here: the library does not check what a server returns.
            parameters = request.parameters(self.settings.limit_parameter)
            completions = client.chat.completions.with_raw_response
            return str(completions.create(model=self.settings.model, messages=request.messages, **parameters).text)

        return self._connection.send(completion, lambda text: parse_answer(text, request.labels), answer_instead)


@cache
def client_of(settings: EndpointConfig, folder: Path, role: JudgeRole) -> Client:
    """Return the client of a server, of which there is one per process, so rate and budget hold for all shards.

    Args:
        settings: settings of the server.
        folder: folder of the answers.
        role: role of the judge that asks.
    """
    return Client(settings, AnswerCache(folder, role), "verdicts.endpoint" if role == "judge" else "evaluation.referee")
