"""The endpoint judge against a real server on this machine."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from chat_server import Asked, Response, chat_server, completion, failure
from selfeval.backbone.roles import Backbone
from selfeval.config import EndpointConfig, JudgeRole, VerdictsConfig, load_config
from selfeval.errors import ConfigError, EndpointError, MissingPackageError
from selfeval.judging.judges import make_judge
from selfeval.judging.judges.endpoint import EndpointJudge
from selfeval.judging.labels import Labels
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.judging.server.cache import AnswerCache
from selfeval.judging.server.chat import Answer
from selfeval.judging.server.client import check_endpoint, client_of
from selfeval.judging.server.parsing import parse_answer
from selfeval.judging.server.reading import read_logprobs, vote_of
from selfeval.judging.server.spending import Spending, spending_of
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import PairwiseEvidence, Unreadable

DUEL = Comparison("What is 2 + 3?", "five", "four")
DUELS = [DUEL, Comparison("And 1 + 1?", "two", "eleven"), Comparison("And 1 + 2?", "three", "no idea")]
Answering = Callable[[Asked], Response]


@cache
def world() -> tuple[Backbone, Templates]:
    backbone = tiny_models.backbone("llama", 384)
    return backbone, Templates.load(templates_folder("no such model"), tiny_models.words_tokenizer())


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    """A client, with its connections and its count of tokens, lives as long as the process."""
    yield
    client_of.cache_clear()


def judge_at(url: str, folder: Path, *, reasoning: bool = True, role: JudgeRole = "judge", **settings: Any) -> EndpointJudge:
    given = EndpointConfig(**{"url": url, "model": "m", "in_flight": 1, "retries": 2, **settings})
    config = VerdictsConfig(judge="endpoint", reasoning=reasoning).model_copy(update={"settings": given})
    backbone, templates = world()
    judge = make_judge(backbone, templates, config, batch_size=8, role=role, answers=folder)
    assert isinstance(judge, EndpointJudge)
    return judge


def verdict(asked: Asked) -> str:
    """`five`, `two` and `three` are right, wherever they are shown."""
    return "A" if any(f"Reply A: {right}" in asked.prompt for right in ("five", "two", "three")) else "B"


def likely(asked: Asked, p: float = 0.9) -> Response:
    better = verdict(asked)
    other = "B" if better == "A" else "A"
    return completion(f"I compared.\nVerdict: {better}", top={f" {better}": p, f" {other}": 0.98 - p, " tie": 0.02})


def judged(answer: Answering, folder: Path, comparisons: list[Comparison] | None = None, **settings: Any) -> list[Judgement]:
    with chat_server(answer) as server:
        return judge_at(server.url, folder, **settings).judge(comparisons or [DUEL])


def evidence(judgement: Judgement) -> PairwiseEvidence:
    assert isinstance(judgement.evidence, PairwiseEvidence)
    return judgement.evidence


# -- probabilities ------------------------------------------------------------------------------------------------------


def test_the_log_probs_at_the_verdict_are_its_probabilities_in_both_orders(tmp_path: Path) -> None:
    with chat_server(likely) as server:
        [found] = judge_at(server.url, tmp_path).judge([DUEL])
    # By hand: labels 0.9, 0.08 and 0.02 sum to 1; half of the tie counts for each reply.
    assert found.probability == pytest.approx(0.91)
    assert found.tie == pytest.approx(0.02)
    assert evidence(found).in_order == pytest.approx(0.91)
    assert evidence(found).swapped == pytest.approx(0.91)
    assert evidence(found).label_masses == pytest.approx((1.0, 1.0))
    assert ["Reply A: five" in asked.prompt for asked in server.asked] == [True, False]
    body = server.asked[0].body
    assert (body["model"], body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (
        *("m", 256, 0.0, True, 20),
    )
    assert server.asked[0].path == "/v1/chat/completions"


def test_a_position_bias_cancels(tmp_path: Path) -> None:
    always_first = completion("Verdict: A", top={" A": 0.8, " B": 0.2})
    assert judged(lambda _: always_first, tmp_path)[0].probability == pytest.approx(0.5)


def test_without_log_probs_sampled_answers_vote(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Response:
        if asked.body["temperature"] == 0.0:
            return completion("Verdict: tie")
        return completion("Verdict: tie" if asked.number % 4 == 0 else f"Verdict: {verdict(asked)}")

    with chat_server(answer) as server:
        [found] = judge_at(server.url, tmp_path, votes=4, temperature=0.7).judge([DUEL])
    assert len(server.asked) == 2 + 8
    assert {asked.body["temperature"] for asked in server.asked} == {0.0, 0.7}
    # By hand: 3 votes for the better reply and 1 for a tie: 4/7, 1/7 and 2/7; the first is better with 4/7 + 1/7.
    assert found.probability == pytest.approx(5 / 7)
    assert found.tie == pytest.approx(2 / 7)
    with chat_server(answer) as server:
        judge_at(server.url, tmp_path, votes=4, probabilities="votes").judge([DUEL])
    assert {asked.body["temperature"] for asked in server.asked} == {1.0}
    assert "logprobs" not in server.asked[0].body


def test_votes_that_cannot_be_read_leave_no_verdict(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Response:
        return completion("Verdict: A" if asked.number % 4 == 0 else "Hmm.")

    [found] = judged(answer, tmp_path, probabilities="votes", votes=4)
    assert found.probability is None
    assert evidence(found).causes == (Unreadable.NO_LEAD, Unreadable.NO_LEAD)
    assert evidence(found).label_masses == (0.25, 0.25)


def test_log_probs_that_are_demanded_and_missing_end_the_stage(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="returned no log-probs for m; set probabilities to votes or auto"):
        judged(lambda asked: completion("Verdict: A"), tmp_path, probabilities="logprobs")


def test_without_reasoning_a_short_line_is_asked_for_and_a_bare_label_is_read(tmp_path: Path) -> None:
    with chat_server(lambda asked: completion(verdict(asked), top={verdict(asked): 0.9, "tie": 0.1})) as server:
        [found] = judge_at(server.url, tmp_path, reasoning=False).judge([DUEL])
    assert found.probability == pytest.approx(0.95)
    said = server.asked[0].body["messages"][-1]["content"]
    assert said.endswith('Your whole answer is one of these lines: "Verdict: A", "Verdict: B", "Verdict: tie".')
    assert server.asked[0].body["max_tokens"] == 32


def test_the_referee_has_its_own_prompt_and_its_own_answers(tmp_path: Path) -> None:
    with chat_server(lambda asked: completion("Better response: 1", top={" 1": 0.6, " 2": 0.4})) as server:
        judge_at(server.url, tmp_path, role="referee").judge([DUEL])
    assert "Response 1: five" in server.asked[0].prompt
    assert spending_of(AnswerCache(tmp_path, "referee")) == Spending(2, 200, 20)
    assert spending_of(AnswerCache(tmp_path, "judge")) == Spending()


# -- answers without a verdict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        (completion("The weather is fine.", top={"fine.": 0.9}), Unreadable.NO_LEAD),
        (completion(""), Unreadable.NO_LEAD),
        (completion(None), Unreadable.NO_LEAD),
        (completion("I'm sorry, but I can't compare these replies.", top={"replies.": 0.9}), Unreadable.REFUSED),
        (completion(None, refusal="I will not."), Unreadable.REFUSED),
        (completion("", finish="content_filter"), Unreadable.REFUSED),
        (failure(400, "blocked", "content_filter"), Unreadable.REFUSED),
        (completion("First, I think that", top={"that": 0.9}, finish="length"), Unreadable.CUT),
        (completion("Verdict: A or perhaps", top={" perhaps": 0.9}, finish="length"), Unreadable.CUT),
        (completion("Verdict: A", top={" A": 0.2, " maybe": 0.7}), Unreadable.LABEL_MASS),
        (failure(400, "This model's maximum context length is 8192 tokens."), Unreadable.NO_ROOM),
        (failure(400, "too long", "context_length_exceeded"), Unreadable.NO_ROOM),
    ],
)
def test_an_answer_without_a_verdict_has_a_cause_and_no_probability(
    response: Response, cause: Unreadable, tmp_path: Path
) -> None:
    [found] = judged(lambda _: response, tmp_path, probabilities="logprobs")
    assert found.probability is None
    assert evidence(found).causes == (cause, cause)


def test_labels_may_have_brackets() -> None:
    labels = Labels(lead="Verdict:", first="[A]", second="[B]", tie="[=]")  # type: ignore[call-arg]
    for text, top in [("Verdict:[B]", {"[B]": 0.8, "[A]": 0.2}), ("Verdict: [B]**", {" [B]": 0.8, " [A]": 0.2})]:
        answer = parse_answer(completion(text.removesuffix("**"), top=top).body, labels)
        assert read_logprobs(answer, labels, 0.5).probabilities == pytest.approx((0.2, 0.8, 0.0))
        assert vote_of(answer, labels) == 1
    assert vote_of(Answer("[=]", "stop", 0, 0), labels) == 2


def test_a_thinking_block_is_skipped(tmp_path: Path) -> None:
    text = "<think>Verdict: B? No.</think>Verdict: A"
    [found] = judged(lambda _: completion(text, top={" A": 0.7, " B": 0.3}), tmp_path)
    assert evidence(found).in_order == pytest.approx(0.7)


# -- nothing is asked twice ---------------------------------------------------------------------------------------------


def test_a_kept_answer_is_not_asked_for_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    with chat_server(likely) as server:
        before = judge_at(server.url, tmp_path).judge([*DUELS, DUEL])
        assert len(server.asked) == 6  # the same comparison twice is asked once
        client_of.cache_clear()
        assert judge_at(server.url, tmp_path).judge([*DUELS, DUEL]) == before
        assert len(server.asked) == 6
        damaged = sorted(tmp_path.rglob("*.json"))
        damaged[0].write_bytes(damaged[0].read_bytes()[:40])
        values = json.loads(damaged[1].read_text())
        values["answer"]["at_verdict"][" A"] = -0.001  # a changed value does not match its hash
        damaged[1].write_text(json.dumps(values))
        client_of.cache_clear()
        assert judge_at(server.url, tmp_path).judge(DUELS) == before[:3]
        assert len(server.asked) == 8
        judge_at(server.url, tmp_path, model="n").judge([DUEL])
        judge_at(server.url, tmp_path, top_logprobs=5).judge([DUEL])
        judge_at(server.url, tmp_path, limit_parameter="max_completion_tokens").judge([DUEL])
        assert len(server.asked) == 14
        assert server.asked[-1].body["max_completion_tokens"] == 256


def test_a_failure_keeps_the_answers_before_it(tmp_path: Path) -> None:
    with chat_server(lambda asked: likely(asked) if asked.number < 4 else failure(500)) as server:
        with pytest.raises(EndpointError, match=r"500.*the server failed 3 times.*rerun the same command to continue"):
            judge_at(server.url, tmp_path).judge(DUELS)
        assert len(server.asked) == 4 + 3
        client_of.cache_clear()
        server.answer = likely
        found = judge_at(server.url, tmp_path).judge(DUELS)
        assert [j.probability for j in found] == pytest.approx([0.91] * 3)
        assert len(server.asked) == 4 + 3 + 2


def test_requests_in_flight_are_kept_when_another_fails(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Response:
        return failure(404) if asked.number == 0 else replace(likely(asked), seconds=0.2)

    with chat_server(answer) as server:
        with pytest.raises(EndpointError):
            judge_at(server.url, tmp_path, in_flight=3, retries=0).judge(DUELS)
        assert len(list(tmp_path.rglob("*.json"))) == len(server.asked) - 1 < 6


# -- retries, rate and time ---------------------------------------------------------------------------------------------


def test_failures_that_pass_are_retried(tmp_path: Path) -> None:
    whole = completion("Verdict: A", top={" A": 0.9, " B": 0.1})
    troubles = [
        *(failure(500), failure(429), replace(whole, body="<html>busy</html>"), replace(whole, cut=30)),
        *(replace(whole, body=whole.body[:50]), replace(whole, body="[]"), replace(whole, body='{"choices": []}')),
    ]
    for number, trouble in enumerate(troubles):
        with chat_server(lambda asked, trouble=trouble: whole if asked.number else trouble) as server:
            judge_at(server.url, tmp_path / str(number), retries=1).judge([DUEL])
        assert len(server.asked) == 3


def test_the_client_waits_as_long_as_the_server_says(tmp_path: Path) -> None:
    wait = {"retry-after-ms": "300"}
    with chat_server(lambda asked: likely(asked) if asked.number else failure(429, headers=wait)) as server:
        start = time.monotonic()
        judge_at(server.url, tmp_path).judge([DUEL])
    assert 0.3 <= time.monotonic() - start < 3  # its own first pause is at most half a second, of at least 0.375


def test_rate_and_parallel_requests_are_limited(tmp_path: Path) -> None:
    slow = replace(completion("Verdict: A", top={" A": 0.9, " B": 0.1}), seconds=0.05)
    with chat_server(lambda asked: slow) as server:
        judge_at(server.url, tmp_path / "a", in_flight=3).judge(DUELS)
        assert server.most_in_flight == 3
        start = time.monotonic()
        judge_at(server.url, tmp_path / "b", in_flight=6, requests_per_minute=600).judge(DUELS)
        assert time.monotonic() - start >= 0.5  # six requests with 0.1 s between them


def test_a_request_that_takes_too_long_ends_the_stage(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"cannot be reached.*or raise verdicts\.endpoint\.timeout \(now 0\.1 s\)"):
        judged(lambda asked: replace(likely(asked), seconds=0.5), tmp_path, timeout=0.1, retries=0)


# -- failures that do not pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (failure(401), r"401.*set verdicts\.endpoint\.key_variable to the variable with the API key"),
        (failure(404), r'404.*check verdicts\.endpoint\.url, and whether the server has the model "m"'),
        (failure(429), r"429.*lower verdicts\.endpoint\.in_flight or verdicts\.endpoint\.requests_per_minute"),
        (failure(400, "logprobs is not supported"), r'400.*set verdicts\.endpoint\.probabilities = "votes"'),
        (failure(400, "max_tokens is not supported"), r"400.*set verdicts\.endpoint\.limit_parameter to the other value"),
        (failure(302, headers={"location": "http://localhost:1/"}), r"302.*redirects are not followed"),
        (Response("<html>hello</html>"), r"returned no chat completion in 1 attempts \(the body is not a JSON object"),
        (Response('{"choices": [{"message": "?"}]}'), r"no choices\[0\]\.message"),
        (Response(json.dumps({"error": {"message": "\x1b[2Jgone"}}), 404), r"\\x1b\[2Jgone"),
    ],
)
def test_other_failures_end_the_stage_with_their_remedy(response: Response, said: str, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=said):
        judged(lambda _: response, tmp_path, retries=0)


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(EndpointError, match=rf"http://127\.0\.0\.1:{port}/v1 cannot be reached .*check that the server runs"):
        judge_at(f"http://127.0.0.1:{port}/v1", tmp_path, retries=0).judge([DUEL])


# -- the key ------------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("SHOP_API_KEY", secret)
    monkeypatch.setenv("OPENAI_ORG_ID", "another-secret")
    caplog.set_level(0)
    with chat_server(lambda asked: likely(asked) if asked.number < 2 else failure(401, f"Bad key {secret}.")) as server:
        judge = judge_at(server.url, tmp_path, key_variable="SHOP_API_KEY")
        judge.judge([DUEL])
        with pytest.raises(EndpointError, match=r"Bad key \*\*\*.*check the key in SHOP_API_KEY") as caught:
            judge.judge(DUELS)
    assert server.asked[0].headers["authorization"] == f"Bearer {secret}"
    assert "openai-organization" not in server.asked[0].headers
    assert secret not in str(caught.value) + repr(caught.value.__cause__) + repr(vars(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert secret not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_text()]
    stored = load_config(None, {}, ["verdicts.judge=endpoint", "verdicts.endpoint.key_variable=SHOP_API_KEY"])
    assert secret not in stored.model_dump_json()


def test_without_a_variable_no_key_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-something-else")
    with chat_server(likely) as server:
        judge_at(server.url, tmp_path).judge([DUEL])
    assert "authorization" not in server.asked[0].headers
    assert "sk-of-something-else" not in str(server.asked[0].headers)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("url=ftp://somewhere", "is not an address"),
        ("url=https://user:word@somewhere/v1", "must not contain a user, a password"),
        ("key_variable=HOME", "must end in API_KEY"),
        ("key_variable=sk-proj-1234", "key_variable"),
        ("budget=3", "budget needs price_read and price_written"),
    ],
)
def test_settings_that_would_give_something_away_are_refused(settings: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, {}, ["verdicts.judge=endpoint", f"verdicts.endpoint.{settings}"])


def test_a_key_is_not_sent_without_encryption() -> None:
    for url, is_fine in [("http://example.org/v1", False), ("https://example.org/v1", True), ("http://localhost:1/v1", True)]:
        given = ["verdicts.judge=endpoint", f"verdicts.endpoint.url={url}", "verdicts.endpoint.key_variable=A_API_KEY"]
        if is_fine:
            load_config(None, {}, given)
        else:
            with pytest.raises(ConfigError, match=r"would be sent to http://example\.org/v1 without encryption"):
                load_config(None, {}, given)


def test_what_is_missing_is_said_before_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = EndpointConfig(url="http://localhost:1/v1", model="m")
    for changes, said in [
        ({"url": ""}, r"verdicts\.endpoint\.url is not set"),
        ({"model": ""}, r"verdicts\.endpoint\.model is not set"),
        ({"key_variable": "NO_SUCH_API_KEY"}, "names NO_SUCH_API_KEY, which is not set; export NO_SUCH_API_KEY"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_endpoint(whole.model_copy(update=changes), "verdicts.endpoint")
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackageError, match=r"needs the package openai; .*'self-evaluator\[endpoint\]'"):
        check_endpoint(whole, "verdicts.endpoint")
    with pytest.raises(ConfigError, match="only `selfeval run`"):
        judge_at("http://localhost:1/v1", None)  # type: ignore[arg-type]


# -- cost ---------------------------------------------------------------------------------------------------------------


def test_a_budget_stops_and_a_higher_one_continues(tmp_path: Path) -> None:
    prices: dict[str, Any] = {"price_read": 5.0, "price_written": 50.0}  # 100 and 10 tokens: 0.001 for an answer
    with chat_server(likely) as server:
        with pytest.raises(EndpointError, match=r"verdicts\.endpoint\.budget = 0\.003 is reached.* 0\.003\. They are kept"):
            judge_at(server.url, tmp_path, budget=0.003, **prices).judge(DUELS)
        assert len(server.asked) == 3
        with pytest.raises(EndpointError, match=r"budget_tokens = 440 is reached.* cost 440 tokens"):
            judge_at(server.url, tmp_path, budget_tokens=440).judge(DUELS)
        assert len(server.asked) == 4
        judge_at(server.url, tmp_path, budget=1, **prices).judge(DUELS)
        assert len(server.asked) == 6
    spent = spending_of(AnswerCache(tmp_path, "judge"))
    assert spent == Spending(6, 600, 60)
    assert spent.cost(EndpointConfig(**prices)) == pytest.approx(0.006)
    assert spent.cost(EndpointConfig(price_read=5.0)) is None


def test_headers_of_another_service_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-gateway\napi-key: sk-other")
    monkeypatch.setenv("SHOP_API_KEY", "sk-mine")
    with chat_server(likely) as server:
        judge_at(server.url, tmp_path / "without").judge([DUEL])
        judge_at(server.url, tmp_path / "with", key_variable="SHOP_API_KEY").judge([DUEL])
    assert [asked.headers.get("authorization") for asked in server.asked] == [None, None, "Bearer sk-mine", "Bearer sk-mine"]
    assert not any("sk-gateway" in str(asked.headers) or "sk-other" in str(asked.headers) for asked in server.asked)


@pytest.mark.parametrize("key", ["sk-secret\nsecond", "sk-s\u00e9cret", "sk-secret second"])
def test_a_key_that_cannot_be_one_is_refused_and_not_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_API_KEY", key)
    settings = EndpointConfig(url="http://localhost:1/v1", model="m", key_variable="SHOP_API_KEY")
    with pytest.raises(ConfigError, match="export SHOP_API_KEY with the API key alone") as raised:
        check_endpoint(settings, "verdicts.endpoint")
    assert "sk-" not in str(raised.value)


def test_a_budget_needs_a_server_that_counts_tokens(tmp_path: Path) -> None:
    def uncounted(asked: Asked) -> Response:
        values = json.loads(likely(asked).body)
        del values["usage"]
        return Response(json.dumps(values))

    with chat_server(uncounted) as server:
        with pytest.raises(EndpointError, match=r"1 of 1 answers\), so verdicts\.endpoint\.budget_tokens cannot be kept"):
            judge_at(server.url, tmp_path, budget_tokens=1).judge(DUELS)
        judge = judge_at(server.url, tmp_path, price_read=1, price_written=1)
        judge.judge(DUELS)
    settings = EndpointConfig(url=server.url, model="m", price_read=1, price_written=1)
    assert spending_of(AnswerCache(tmp_path, "judge")).cost(settings) is None


def test_a_prompt_that_does_not_fit_is_asked_again_and_the_key_is_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_API_KEY", "sk-mine")
    short = [True]

    def answer(asked: Asked) -> Response:
        message = "the maximum context length is 10 tokens; your key is sk-mine"
        return failure(400, message) if short[0] else likely(asked)

    with chat_server(answer) as server:
        [found] = judge_at(server.url, tmp_path, key_variable="SHOP_API_KEY").judge([DUEL])
        assert found.probability is None
        assert "sk-mine" not in str(found)
        assert not list(tmp_path.rglob("*.json"))
        short[0] = False
        [found] = judge_at(server.url, tmp_path, key_variable="SHOP_API_KEY").judge([DUEL])
    assert found.probability == pytest.approx(0.91)
