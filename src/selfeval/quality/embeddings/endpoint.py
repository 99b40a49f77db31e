"""A server with the OpenAI embeddings protocol. Texts are sent to it; vectors are kept by the cache of the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

import numpy as np

from selfeval.config import EmbeddingEndpointConfig
from selfeval.errors import EndpointError, RunFolderError, StorageError
from selfeval.quality.embeddings.protocol import Vectors, unit_rows
from selfeval.servers.connection import Connection, Malformed, check_server
from selfeval.store import fingerprint, read_sealed, write_sealed
from selfeval.texts import json_object

__all__ = ["EndpointEmbedder", "check_embedding_server", "parse_embeddings"]

_MILLION = 1_000_000
_SECTION, _WORK = "embeddings.endpoint", "the endpoint embedder"


def check_embedding_server(settings: EmbeddingEndpointConfig) -> None:
    """Check, without a request, that a server can be asked; see `servers.connection.check_server`."""
    check_server(settings, _SECTION, _WORK)


class EndpointEmbedder:
    """Embeds texts by asking a server, several requests at a time.

    Args:
        settings: settings of the server.
        folder: Optional. Folder in which the number of tokens of each request is kept, so that the budget holds for all
            commands on a run. Default: the budget holds for this object.
        note: Optional. Receives a message if the number of tokens cannot be kept.

    Raises:
        ConfigError: the address, the model or the key is not set.
        MissingPackageError: the client is not installed.
    """

    def __init__(
        self,
        settings: EmbeddingEndpointConfig,
        folder: Path | None = None,
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.settings, self._folder, self._note, self._lock = settings, folder, note, Lock()
        self._connection = Connection(settings, _SECTION, _WORK, "embeddings")
        self._name = f"endpoint-{fingerprint([settings.url, settings.model, settings.dimensions])[:16]}"
        self.tokens = sum(_kept_tokens(folder)) if folder is not None else 0

    @property
    def name(self) -> str:
        """Identifier of the server, the model and the dimensions."""
        return self._name

    @property
    def cost(self) -> float | None:
        """Price of all tokens so far, those of earlier commands included; None without a price."""
        price = self.settings.price_read
        return None if price is None else self.tokens * price / _MILLION

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return `[N, D]` vectors of length 1; a blank text has a row of zeros and is not sent. Equal texts are sent once.

        Raises:
            EndpointError: the server refuses, cannot be reached after all retries, or returns vectors of several widths, or the
                budget is spent.
        """
        distinct = [text for text in dict.fromkeys(texts) if text.strip()]
        parts = [distinct[i : i + self.settings.batch_size] for i in range(0, len(distinct), self.settings.batch_size)]
        if not parts:
            return np.zeros((len(texts), self.settings.dimensions or 0), np.float32)
        try:
            self._connection.open()
            with ThreadPoolExecutor(self.settings.in_flight) as pool:
                found = list(pool.map(self._ask, parts))
        finally:
            self._connection.close()
        if len(widths := sorted({part.shape[1] for part in found})) > 1:
            raise EndpointError(
                f"the server at {self.settings.url} returned vectors with {' and '.join(map(str, widths))} dimensions for one "
                f"model; check {_SECTION}.model, or set {_SECTION}.dimensions to request one width"
            )
        vectors = unit_rows(np.concatenate(found))
        rows = dict(zip(distinct, vectors, strict=True))
        blank = np.zeros(vectors.shape[1], np.float32)
        return np.stack([rows.get(text, blank) for text in texts])

    def _ask(self, part: Sequence[str]) -> Vectors:
        self._refuse_above_budget()
        options = {} if self.settings.dimensions is None else {"dimensions": self.settings.dimensions}

        def send(client: Any) -> str:
            raw = client.embeddings.with_raw_response
            return str(raw.create(model=self.settings.model, input=list(part), encoding_format="float", **options).text)

        vectors, tokens = self._connection.send(send, lambda body: parse_embeddings(body, len(part)))
        # A server that counts nothing would have no budget.
        self._count(tokens or sum(map(_estimated_tokens, part)))
        return vectors

    def _count(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens
            if self._folder is None:
                return
            try:
                write_sealed(self._folder / f"{uuid4().hex}.json", {"tokens": tokens})
            except StorageError as error:
                # The vectors are paid for, so a full disk does not lose them.
                self._note(f"{tokens} tokens of {self.settings.model} are not counted by later commands: {error}")

    def _refuse_above_budget(self) -> None:
        settings = self.settings
        spent = {"budget": self.cost, "budget_tokens": self.tokens}
        for name, value in spent.items():
            limit = getattr(settings, name)
            if limit is not None and value is not None and value >= limit:
                raise EndpointError(
                    f"{_SECTION}.{name} = {limit:g} is reached: the vectors of {settings.model} cost {value:g}. They are kept; "
                    f"raise {_SECTION}.{name} (or set it to none) and rerun the same command to continue"
                )


def _estimated_tokens(text: str) -> int:
    """Return the number of tokens of a text at 4 characters each, rounded up."""
    return -(-len(text) // 4)


def parse_embeddings(body: str, count: int) -> tuple[Vectors, int]:
    """Return the vectors `[N, D]` of a response in the order of their `index`, and the tokens that the server counted, or 0.

    Args:
        body: body of the response.
        count: N, the number of texts that were sent.

    Raises:
        Malformed: it is no JSON, or not a list of `count` vectors of one width.
    """
    try:
        values = json_object(body)
        rows: Sequence[Mapping[str, Any]] = sorted(values["data"], key=lambda row: int(row["index"]))
        vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
        usage = values.get("usage") or {}
        tokens = max(0, int(usage.get("prompt_tokens") or 0))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise Malformed(f"the body is not a list of embeddings: {error}") from error
    if vectors.ndim != 2 or len(vectors) != count or not vectors.size or not np.isfinite(vectors).all():
        raise Malformed(f"expected {count} vectors of finite numbers, got an array of shape {vectors.shape}")
    return vectors, tokens


def _kept_tokens(folder: Path) -> list[int]:
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(int(read_sealed(path, "tokens", remedy="")["tokens"]))
        except (RunFolderError, TypeError, ValueError):
            continue
    return found
