"""`selfeval serve` as a process: real requests of OpenAI's client and of httpx."""

from __future__ import annotations

import base64
import json
import math
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import selfeval
from selfeval.backbone.adapters import BASE
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from served import QUESTION, TOKEN, Served, chat, serving, wait_for
from toy import ToyRun

REPLIES = ["3 + 2 = 5. The answer is 5.", "3 - 2 = 1. The answer is 1.", "Well, 6"]
LONG: dict[str, Any] = {"model": "base", "prompt": "Tom", "temperature": 2, "max_tokens": 480, "n": 8}
"""A request of several seconds: random tokens rarely end a reply."""


@pytest.fixture(scope="module")
def served(toy_run: ToyRun) -> Iterator[Served]:
    with serving(toy_run.folder) as found:
        yield found
        assert found.process.poll() is None, found.process.communicate()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key=TOKEN, max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as found:
        yield found


@pytest.fixture(scope="module")
def run(toy_run: ToyRun) -> selfeval.Run:
    return selfeval.Run.open(toy_run.folder)


@pytest.fixture(scope="module")
def policy(run: selfeval.Run) -> Any:
    return run.policy()


@pytest.fixture(scope="module")
def evaluator(run: selfeval.Run, policy: Any) -> Any:
    return run.evaluator()


# -- replies ------------------------------------------------------------------------------------------------------------


def test_choices_are_the_replies_of_the_python_api(client: openai.OpenAI, policy: Any) -> None:
    found = client.chat.completions.create(**chat(n=3, seed=5))
    assert [choice.message.content for choice in found.choices] == policy.reply(QUESTION, 3, seed=5, temperature=1.0, top_p=1.0)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in found.choices} <= {"stop", "length"}
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_concurrent_requests_receive_their_own_replies(served: Served, policy: Any) -> None:
    """More requests than places, so that rows join and leave; each reply is that of its seed."""
    expected = {seed: policy.reply(QUESTION, seed=seed, temperature=1.0, top_p=1.0) for seed in range(12)}

    def ask(seed: int) -> tuple[int, str]:
        found = served.post("/v1/chat/completions", chat(seed=seed)).json()
        return seed, found["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(12) as pool:
        assert {seed: [text] for seed, text in pool.map(ask, expected)} == expected


def test_a_stream_adds_up_to_the_whole_reply(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**chat(n=2, seed=3, logprobs=True, top_logprobs=2))
    chunks = list(
        client.chat.completions.create(
            **chat(n=2, seed=3, logprobs=True, top_logprobs=2), stream=True, stream_options={"include_usage": True}
        )
    )
    for index, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        assert choice.logprobs.content
        tokens = [token for part in parts if part.logprobs for token in part.logprobs.content or []]
        assert [token.token for token in tokens] == [token.token for token in choice.logprobs.content]
        assert [token.logprob for token in tokens] == pytest.approx([t.logprob for t in choice.logprobs.content], abs=1e-4)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_the_lines_of_a_stream_end_with_done(served: Served) -> None:
    with served.http.stream("POST", "/v1/completions", json={"model": "base", "prompt": "Tom", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


def test_the_likeliest_token_of_a_greedy_reply_is_the_sampled_one(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(**chat(temperature=0, logprobs=True, top_logprobs=3))
    assert found.choices[0].logprobs is not None
    for token in found.choices[0].logprobs.content or []:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4)
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob


def test_a_stop_string_ends_the_reply_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**chat(temperature=0)).choices[0].message.content
    assert whole is not None
    stop = whole.split()[3]
    for stream in (False, True):
        body = chat(temperature=0, stop=[stop, "never"], logprobs=True)
        if stream:
            parts = [part for chunk in client.chat.completions.create(**body, stream=True) for part in chunk.choices]
            text, reason = "".join(part.delta.content or "" for part in parts), parts[-1].finish_reason
            tokens = [token.token for part in parts if part.logprobs for token in part.logprobs.content or []]
        else:
            choice = client.chat.completions.create(**body).choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
            assert choice.logprobs is not None
            tokens = [token.token for token in choice.logprobs.content or []]
        assert text == whole[: whole.index(stop)].strip()
        assert reason == "stop"
        assert "".join(tokens).strip() == text


def test_a_tiny_temperature_is_greedy(served: Served) -> None:
    texts = [
        served.post("/v1/chat/completions", chat(temperature=t)).json()["choices"][0]["message"]
        for t in (0, 5e-324, 1e-40, 1e-4)
    ]
    assert texts == texts[:1] * 4


def test_a_completion_continues_its_prompt(client: openai.OpenAI, policy: Any) -> None:
    """Several prompts, texts and token ids; the base replies as the engine does."""
    backbone, tokenizer = policy._model.backbone, policy._model.templates.tokenizer
    prompts = [tokenizer.encode(text) for text in ("Tom has 3", "Mary buys")]
    expected = []
    for prompt in prompts:
        with backbone.acting_as(BASE):
            requests = [Request(_prompt(prompt), stream=stream) for stream in (0, 1)]
            expected += generate(backbone, requests, max_new_tokens=6, seed=9)
    texts = [tokenizer.decode([i for i in rollout.ids if i not in backbone.loaded.eos_ids]) for rollout in expected]
    for given in (["Tom has 3", "Mary buys"], prompts):
        found = client.completions.create(model="base", prompt=given, n=2, seed=9, max_tokens=6, logprobs=1)
        assert [choice.text for choice in found.choices] == texts
        assert found.choices[0].logprobs is not None
        assert found.choices[0].logprobs.token_logprobs == pytest.approx(
            [p for i, p in zip(expected[0].ids, expected[0].logprobs, strict=True) if i not in backbone.loaded.eos_ids],
            abs=1e-4,
        )
        assert found.choices[0].finish_reason == ("stop" if expected[0].finished else "length")


def _prompt(ids: list[int]) -> Any:
    from selfeval.prompt import Prompt

    return Prompt(tuple(ids))


def test_the_best_of_several_replies_has_the_highest_score(served: Served, policy: Any, evaluator: Any) -> None:
    found = served.post("/v1/chat/completions", chat(n=2, best_of=6, seed=1)).json()["choices"]
    replies = policy.reply(QUESTION, 6, seed=1, temperature=1.0, top_p=1.0)
    scores = evaluator.score(QUESTION, replies)
    ranked = sorted(zip(scores, replies, strict=True), reverse=True)
    assert [choice["score"] for choice in found] == pytest.approx([score for score, _ in ranked[:2]], abs=1e-4)
    assert found[0]["message"]["content"] == ranked[0][1]
    assert found[0]["confidence"] == pytest.approx(evaluator.rank([(QUESTION, replies)])[0].confidence, abs=1e-4)
    assert found[1]["confidence"] <= 0.5 + 1e-6


# -- scores -------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_python_api(served: Served, evaluator: Any) -> None:
    single = served.post("/v1/score", {"question": QUESTION, "replies": REPLIES}).json()["data"]
    items = [
        {"messages": [{"role": "user", "content": QUESTION}], "replies": REPLIES},
        {"question": "Why?", "replies": ["So."]},
    ]
    both = served.post("/v1/score", {"items": items, "sure": 0.5}).json()["data"]
    expected = evaluator.score(QUESTION, REPLIES)
    assert single[0]["scores"] == pytest.approx(expected, abs=1e-4)
    assert both[0]["scores"] == pytest.approx(expected, abs=1e-4)
    assert (single[0]["preferred"], both[0]["unsure"]) == (expected.index(max(expected)), False)
    assert (both[1]["preferred"], both[1]["confidence"]) == (None, None)


def test_concurrent_scores_are_not_mixed_up(served: Served, evaluator: Any) -> None:
    questions = [f"Tom has {n} pens. He buys 2 more. How many pens does Tom have now?" for n in range(3, 11)]
    expected = [evaluator.score(question, REPLIES) for question in questions]

    def ask(question: str) -> Any:
        return served.post("/v1/score", {"question": question, "replies": REPLIES}).json()["data"][0]["scores"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, questions)) == [pytest.approx(scores, abs=1e-4) for scores in expected]


def test_a_comparison_is_that_of_the_python_api(served: Served, evaluator: Any) -> None:
    found = served.post("/v1/compare", {"question": QUESTION, "a": REPLIES[0], "b": REPLIES[1], "sure": 0.5}).json()
    expected = evaluator.compare(QUESTION, REPLIES[0], REPLIES[1], sure=0.5)
    assert found["probability"] == pytest.approx(expected.probability, abs=1e-4)
    assert (found["preferred"], found["state"]) == (expected.preferred, expected.state.value)
    same = served.post("/v1/compare", {"question": QUESTION, "a": "5", "b": "5"}).json()
    assert (same["preferred"], same["state"]) == ("unsure", "unsure")


@pytest.mark.parametrize("version", [1, 2])
def test_documents_are_ordered_by_their_scores(version: int, served: Served, evaluator: Any, toy_run: ToyRun) -> None:
    body = {"model": "evaluator", "query": QUESTION, "documents": [REPLIES[0], {"text": REPLIES[1]}, REPLIES[2]], "top_n": 2}
    found = served.post(f"/v{version}/rerank", {**body, "return_documents": True}).json()
    scores = evaluator.score(QUESTION, REPLIES)
    order = sorted(range(3), key=lambda index: -scores[index])[:2]
    assert [result["index"] for result in found["results"]] == order
    assert [result["document"]["text"] for result in found["results"]] == [REPLIES[index] for index in order]
    temperature = json.loads((toy_run.folder / "roles" / "evaluator-0" / "evaluator.json").read_text("utf-8"))["temperature"]
    expected = [1 / (1 + math.exp(-scores[index] / temperature)) for index in order]
    assert [result["relevance_score"] for result in found["results"]] == pytest.approx(expected, abs=1e-4)
    assert "document" not in served.post(f"/v{version}/rerank", body).json()["results"][0]


def test_an_embedding_is_the_mean_of_the_last_hidden_states(client: openai.OpenAI, served: Served, policy: Any) -> None:
    import torch

    backbone, tokenizer = policy._model.backbone, policy._model.templates.tokenizer
    texts = ["Tom has 3 pens.", "Why?"]
    found = [np.array(item.embedding) for item in client.embeddings.create(model="base", input=texts).data]
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad(), backbone.acting_as(BASE):
            # The model's own pass: its last hidden state is after the final norm.
            hidden = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        mean = hidden.mean(0).numpy()
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    raw = served.post("/v1/embeddings", {"model": "base", "input": texts[0], "encoding_format": "base64"}).json()["data"][0]
    assert np.frombuffer(base64.b64decode(raw["embedding"]), "<f4") == pytest.approx(found[0], abs=1e-6)


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_the_errors_of_openais_client(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match=r'model "gpt" does not exist; models for this endpoint: policy, base'):
        client.chat.completions.create(**{**chat(), "model": "gpt"})
    with pytest.raises(openai.NotFoundError, match="scores and does not reply"):
        client.completions.create(model="evaluator", prompt="x")
    with pytest.raises(openai.BadRequestError, match="does not support"):
        client.chat.completions.create(**chat(frequency_penalty=0.5))
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", http_client=httpx.Client(trust_env=False))
    with stranger, pytest.raises(openai.AuthenticationError, match="missing or wrong token"):
        stranger.models.list()
    assert [model.id for model in client.models.list()] == ["policy", "base", "evaluator"]
    assert client.models.retrieve("base").id == "base"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat/completions", chat(functions=[]), 400, 'does not support the parameter "functions"'),
        ("chat/completions", chat(tools=[{"type": "function"}]), 400, '"tools"; remove it, or pass []'),
        ("completions", {"model": "base", "prompt": " ", "best_of": 2}, 400, "questions must not be empty"),
        ("chat/completions", chat(n=2, best_of=1), 400, "best_of (1) must be at least n (2)"),
        ("chat/completions", chat(best_of=2, stream=True), 400, "best_of cannot be streamed"),
        ("chat/completions", chat(n=17), 400, "n: got 17, the limit is 16 (--max-n)"),
        ("chat/completions", chat(max_tokens=2000), 400, "max_tokens: got 2,000, the limit is 1,024 (--max-tokens)"),
        ("chat/completions", chat(max_tokens=511), 400, "the context of this model is 512"),
        ("chat/completions", chat("x " * 700), 400, "the context of this model is 512"),
        ("chat/completions", chat("x " * 2100), 400, "the limit is 2,048 (--max-prompt-tokens)"),
        ("chat/completions", chat("x " * 2100, stream=True), 400, "the limit is 2,048 (--max-prompt-tokens)"),
        ("chat/completions", chat(temperature=3), 400, "temperature: Input should be less than or equal to 2; got 3"),
        ("chat/completions", {"model": "policy"}, 400, '"messages" is missing'),
        ("chat/completions", [], 400, "the body"),
        ("completions", {"model": "base", "prompt": [99999]}, 400, "the model has"),
        (
            "completions",
            {"model": "base", "prompt": "x", "top_p": 5e-324},
            400,
            "top_p: Input should be greater than or equal to",
        ),
        ("completions", {"model": "base", "prompt": "x", "repetition_penalty": 5e-324}, 400, "greater than or equal to 0.01"),
        ("completions", {"model": "base", "prompt": "x", "echo": 0}, 400, '"echo"; remove it, or pass false'),
        ("completions", {"model": "base", "prompt": "x", "n": True}, 400, "n: Input should be a valid integer; got true"),
        ("completions", {"model": "base", "prompt": "x", "echo": True}, 400, '"echo"; remove it, or pass false'),
        ("score", {"question": "x", "replies": ["y"] * 257}, 400, "replies: got 257, the limit is 256 (--max-texts)"),
        ("score", {"question": " ", "replies": ["y"]}, 400, "question"),
        ("score", {"question": "x", "replies": ["y " * 600]}, 400, "more than this model's context of 512"),
        ("rerank", {"model": "rerank-v3.5", "query": "x", "documents": ["y"]}, 404, "models for this endpoint: evaluator"),
        ("embeddings", {"model": "policy", "input": "x"}, 404, "models for this endpoint: base"),
        ("embeddings", {"model": "base", "input": "x " * 600}, 400, "the context of this model is 512"),
        ("nothing", {}, 404, "there is no /v1/nothing here"),
        ("models", {}, 405, "does not accept POST"),
    ],
)
def test_a_refusal_names_the_value_the_limit_and_the_option(
    path: str, body: Any, status: int, message: str, served: Served
) -> None:
    response = served.post(f"/v1/{path}", body)
    error = response.json()["error"]
    assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]


def test_a_body_that_is_too_large_is_refused_also_in_chunks(served: Served) -> None:
    headers = {"content-type": "application/json"}
    whole = served.http.post("/v1/score", content=b" " * (4 << 20) + b"{}", headers=headers)
    chunks = served.http.post("/v1/score", content=(b" " * (1 << 20) for _ in range(5)), headers=headers)
    for response in (whole, chunks):
        assert response.status_code == 413
        assert "the limit is 4,194,304 (--max-body-bytes)" in response.json()["error"]["message"]


def test_a_broken_body_is_refused(served: Served) -> None:
    headers = {"content-type": "application/json"}
    for content in (
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "base", "prompt": NaN}',
        b"",
    ):
        response = served.http.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 400, content[:20]
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_only_the_status_is_public(served: Served) -> None:
    with httpx.Client(base_url=served.url, trust_env=False) as stranger:
        assert stranger.get("/health").json() == {"status": "ok"}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert stranger.get(path).status_code == 401
        assert stranger.get("/health", headers={"host": "evil.example"}).status_code == 403


# -- clients that leave ---------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_places(served: Served) -> None:
    """The request would take much longer than the time after which its places must be free."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    for stream in (False, True):
        body = json.dumps({**LONG, "stream": stream})
        head = ("POST /v1/completions HTTP/1.1", "Host: localhost", f"Authorization: Bearer {TOKEN}")
        lines = (*head, "Content-Type: application/json", f"Content-Length: {len(body)}", "", body)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall("\r\n".join(lines).encode())
            wait_for(lambda: served.health()["running"] == 8)
        wait_for(served.is_idle, 5)
    text = served.http.get("/metrics").text
    assert 'selfeval_requests_total{path="/v1/completions",status="499"}' in text, "the one that received nothing"


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    def value(name: str) -> float:
        lines = served.http.get("/metrics").text.splitlines()
        return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)), 0.0)

    names = ('selfeval_tokens_total{kind="completion"}', 'selfeval_requests_total{path="/v1/chat/completions",status="200"}')
    before = [value(name) for name in names]
    usage = served.post("/v1/chat/completions", chat()).json()["usage"]
    assert [value(name) for name in names] == [before[0] + usage["completion_tokens"], before[1] + 1]
    assert value("selfeval_cache_bytes") > 0
    # The same reply again is drafted from the first one.
    accepted = value('selfeval_drafted_tokens_total{result="accepted"}')
    served.post("/v1/chat/completions", chat(temperature=0))
    served.post("/v1/chat/completions", chat(temperature=0))
    assert value('selfeval_drafted_tokens_total{result="accepted"}') > accepted
    assert value('selfeval_request_seconds_count{path="/v1/chat/completions"}') == before[1] + 3 + value(
        'selfeval_requests_total{path="/v1/chat/completions",status="400"}'
    ) + value('selfeval_requests_total{path="/v1/chat/completions",status="404"}')


# -- a full queue, and the end ----------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_a_signal_lets_running_requests_finish(toy_run: ToyRun) -> None:
    with serving(toy_run.folder, "--places", "2", "--queue", "2", "--drain-seconds", "60") as served:
        answers: list[httpx.Response] = []
        body = {**LONG, "n": 4, "max_tokens": 120, "seed": 0}
        thread = threading.Thread(target=lambda: answers.append(served.post("/v1/completions", body)))
        thread.start()
        wait_for(lambda: served.health()["running"] == 2)
        assert served.health()["waiting"] == 2
        full = served.post("/v1/completions", {"model": "base", "prompt": "x"})
        assert full.status_code == 429
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert "(2 requests, --queue)" in full.json()["error"]["message"]
        # Scores have a queue of their own.
        assert served.post("/v1/score", {"question": QUESTION, "replies": ["5"]}).status_code == 200
        served.process.send_signal(15)
        wait_for(lambda: served.http.get("/health").status_code == 503)
        late = served.post("/v1/completions", {"model": "base", "prompt": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        thread.join()
        assert answers[0].status_code == 200
        assert len(answers[0].json()["choices"]) == 4
        assert served.end() == 0


def test_a_second_signal_ends_at_once(toy_run: ToyRun) -> None:
    with serving(toy_run.folder, token="") as served:
        assert "Token: " in served.process.written()
        served.http.headers["Authorization"] = f"Bearer {served.process.written().split('Token: ')[1].strip()}"
        with served.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            next(response.iter_lines())
            served.process.send_signal(2)
            wait_for(lambda: served.http.get("/health").json()["status"] == "draining")
            served.process.send_signal(2)
            assert served.end() == 130
