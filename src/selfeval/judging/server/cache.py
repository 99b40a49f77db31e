"""The answers of a server on disk: one file per answer, named by the hash of everything that it depends on.

A killed run therefore asks nothing twice, and the folder shows how many tokens were paid for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from selfeval.config import EndpointConfig, JudgeRole
from selfeval.errors import RunFolderError
from selfeval.judging.server.chat import Answer, ChatRequest
from selfeval.records import from_json, to_json
from selfeval.store import read_sealed, write_sealed

__all__ = ["ANSWERS", "AnswerCache"]

ANSWERS = "answers"
"""Folder in a run folder with the answers of servers."""
_WRITING = threading.Lock()


class AnswerCache:
    """Answers by the hash of server, model, messages, parameters and draw.

    Args:
        folder: folder of the answers.
        role: role of the judge that asks; the cost is reported by role.
    """

    def __init__(self, folder: Path, role: JudgeRole) -> None:
        self.folder, self.role = folder, role

    def path(self, settings: EndpointConfig, request: ChatRequest) -> Path:
        """Return the file of an answer."""
        parameters = request.parameters(settings.limit_parameter)
        identity = json.dumps([settings.url, settings.model, parameters, request.identity], sort_keys=True)
        # The whole hash: a collision would be a wrong verdict.
        name = hashlib.sha256(identity.encode()).hexdigest()
        return self.folder / self.role / name[:2] / f"{name}.json"

    def read(self, path: Path) -> Answer | None:
        """Return a kept answer; None if there is none, or if its file is damaged, so that it is asked for again."""
        try:
            return from_json(Answer, read_sealed(path, "answer", remedy="")["answer"])
        except (RunFolderError, TypeError, ValueError):
            return None

    def write(self, path: Path, answer: Answer) -> None:
        """Keep an answer."""
        # One at a time: writing a file reads the umask, for which it has to be changed for a moment.
        with _WRITING:
            write_sealed(path, {"answer": to_json(answer)})

    def all(self) -> Iterator[Answer]:
        """Yield the kept answers to requests in this role."""
        for path in sorted((self.folder / self.role).glob("*/*.json")):
            if (answer := self.read(path)) is not None:
                yield answer
