"""The embedder that asks a server: real HTTP on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from chat_server import NOW, Asked, Response, chat_server, failure
from selfeval.config import EmbeddingEndpointConfig
from selfeval.errors import ConfigError, EndpointError
from selfeval.quality.embeddings.cache import CachedEmbedder
from selfeval.quality.embeddings.endpoint import EndpointEmbedder, parse_embeddings
from selfeval.servers.connection import Malformed

pytest.importorskip("openai")


def vectors(texts: Sequence[str]) -> Response:
    rows = [{"index": n, "embedding": [float(len(text)), 1.0]} for n, text in enumerate(texts)]
    # Servers may answer in any order.
    return Response(json.dumps({"data": rows[::-1], "usage": {"prompt_tokens": 10 * len(texts)}}))


def answer(asked: Asked) -> Response:
    return vectors(asked.body["input"])


def test_texts_are_sent_in_batches_and_once(tmp_path: Path) -> None:
    with chat_server(answer) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m", batch_size=2, price_read=2.0)
        embedder = EndpointEmbedder(settings, tmp_path)
        found = embedder.embed(["abc", "", "a", "abc", "ab"])
        sent = sorted(tuple(asked.body["input"]) for asked in server.asked)
    assert sent == [("ab",), ("abc", "a")]
    assert all(asked.path.endswith("/embeddings") for asked in server.asked)
    expected = np.array([[3, 1], [0, 0], [1, 1], [3, 1], [2, 1]], np.float32)
    lengths = np.array([10**0.5, 1, 2**0.5, 10**0.5, 5**0.5])[:, None]
    assert found == pytest.approx(expected / lengths, abs=1e-6)
    # 30 tokens at 2 per million.
    assert (embedder.tokens, embedder.cost) == (30, pytest.approx(6e-5))
    assert EndpointEmbedder(settings, tmp_path).tokens == 30


def test_a_failure_is_retried_and_the_cache_asks_nothing_twice(tmp_path: Path) -> None:
    def first_fails(asked: Asked) -> Response:
        return failure(500, headers=NOW) if asked.number == 0 else answer(asked)

    with chat_server(first_fails) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m")
        first = CachedEmbedder(EndpointEmbedder(settings), tmp_path).embed(["a", "b"])
        count = len(server.asked)
        assert count == 2
        assert (CachedEmbedder(EndpointEmbedder(settings), tmp_path).embed(["a", "b"]) == first).all()
        assert len(server.asked) == count


def test_the_budget_stops_before_the_next_request(tmp_path: Path) -> None:
    with chat_server(answer) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m", budget_tokens=15)
        EndpointEmbedder(settings, tmp_path).embed(["a", "b"])
        with pytest.raises(EndpointError, match=r"embeddings\.endpoint\.budget_tokens = 15 is reached"):
            EndpointEmbedder(settings, tmp_path).embed(["c"])
        assert len(server.asked) == 1


def test_blank_texts_without_dimensions_do_not_spoil_the_kept_vectors(tmp_path: Path) -> None:
    with chat_server(answer) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m", batch_size=1, in_flight=1)
        cached = CachedEmbedder(EndpointEmbedder(settings), tmp_path, group=1)
        assert cached.embed(["", " "]).shape[0] == 2
        assert cached.embed(["", "a", " "]).any(axis=1).tolist() == [False, True, False]
        assert [asked.body["input"] for asked in server.asked] == [["a"]]


def test_vectors_of_two_widths_are_refused() -> None:
    def widening(asked: Asked) -> Response:
        return Response(json.dumps({"data": [{"index": 0, "embedding": [1.0] * len(asked.body["input"][0])}]}))

    with chat_server(widening) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m", batch_size=1)
        with pytest.raises(EndpointError, match="vectors with 2 and 5 dimensions for one model"):
            EndpointEmbedder(settings).embed(["ab", "abcde"])


def test_tokens_that_a_server_does_not_count_are_estimated(tmp_path: Path) -> None:
    def uncounted(asked: Asked) -> Response:
        return Response(json.dumps({"data": [{"index": n, "embedding": [1.0]} for n, _ in enumerate(asked.body["input"])]}))

    with chat_server(uncounted) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m", budget_tokens=3)
        embedder = EndpointEmbedder(settings, tmp_path)
        embedder.embed(["abcde", "abcd"])
        assert embedder.tokens == 3  # 5 and 4 characters, 4 per token, rounded up
        with pytest.raises(EndpointError, match="budget_tokens = 3 is reached"):
            EndpointEmbedder(settings, tmp_path).embed(["c"])


def test_vectors_that_are_paid_for_survive_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    told: list[str] = []
    with chat_server(answer) as server:
        embedder = EndpointEmbedder(EmbeddingEndpointConfig(url=server.url, model="m"), tmp_path / "file", told.append)
        assert embedder.embed(["a"]).shape == (1, 2)
    assert embedder.tokens == 10
    assert told[0].startswith("10 tokens of m are not counted by later commands: ")


def test_a_server_of_another_protocol_is_named() -> None:
    with chat_server(lambda asked: Response('{"choices": []}')) as server:
        settings = EmbeddingEndpointConfig(url=server.url, model="m", retries=0)
        with pytest.raises(EndpointError, match="returned no embeddings in 1 attempts"):
            EndpointEmbedder(settings).embed(["a"])


def test_settings_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"embeddings\.endpoint\.url is not set"):
        EndpointEmbedder(EmbeddingEndpointConfig())


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        '{"data": [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}]}',
        '{"data": [{"index": 0, "embedding": [1.0]}]}',
        '{"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]}',
        '{"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1e999]}]}',
        '{"data": [{"embedding": [1.0]}, {"embedding": [1.0]}]}',
    ],
)
def test_other_bodies_are_malformed(body: str) -> None:
    with pytest.raises(Malformed):
        parse_embeddings(body, 2)
