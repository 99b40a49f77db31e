"""The open batch: each reply equals that of `generate` for the request alone, whoever else joins, leaves or fails."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny_models
from scarce import no_memory
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.errors import InputError, MemoryLimitError, ModelError, NotFiniteError, RoleError
from selfeval.prompt import Image, Prompt
from selfeval.rollout.engine import count_tokens, generate
from selfeval.rollout.guide import Guide
from selfeval.rollout.live import LiveBatch, NewToken, Ticket
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.thinking import ThinkingTokens

ENDS = (1, 20, 21, 22)
LIMIT = 12
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.1},
    {"top_p": 0.7},
    {"top_k": 4, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 1.3},
    {"repetition_penalty": 1.4},
    {"stop_strings": ("e", "to")},
]


def trained(family: str, **changes: Any) -> Backbone:
    backbone = tiny_models.backbone(family, eos=changes.pop("eos", ENDS), **changes)
    backbone.roles.add("policy")
    tiny_models.scramble(backbone, "policy", size=0.1)
    return backbone


def alone(backbone: Backbone, request: Request, seed: int, limit: int = LIMIT, **options: Any) -> Rollout:
    """The reply of `generate` to one request."""
    with backbone.acting_as("policy"):
        return generate(backbone, [replace(request, stream=0)], max_new_tokens=limit, seed=seed, **options)[0]


def some_requests(count: int, longest: int, seed: int = 0) -> list[Request]:
    """Requests with prompts of all lengths in random order, some of them equal to the one before."""
    dice = random.Random(seed)
    prompts = [tuple(dice.randrange(2, 40) for _ in range(dice.choice((1, 2, 5, longest)))) for _ in range(count)]
    prompts = [prompts[i - 1] if i and dice.random() < 0.2 else p for i, p in enumerate(prompts)]
    return [Request(Prompt(p), **SETTINGS[i % len(SETTINGS)]) for i, p in enumerate(prompts)]


class Client:
    """A request and everything that is reported about it."""

    def __init__(self, batch: LiveBatch, request: Request, seed: int, **options: Any) -> None:
        self.request, self.seed = request, seed
        self.tokens: list[NewToken] = []
        self.replies: list[Rollout] = []
        self.errors: list[Exception] = []
        self.ticket: Ticket = batch.add(
            request, seed=seed, limit=options.pop("limit", LIMIT), on_token=options.pop("on_token", self.tokens.append),
            on_end=self.replies.append, on_error=self.errors.append, **options,
        )  # fmt: skip

    def check(self, expected: Rollout) -> None:
        """The reply is the expected one, and each of its tokens was reported once."""
        (reply,) = self.replies
        assert self.ticket.rollout is reply
        assert self.errors == []
        assert (reply.ids, reply.finished, reply.hidden) == (expected.ids, expected.finished, expected.hidden)
        assert reply.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert [token.id for token in self.tokens] == list(reply.ids)
        assert [token.logprob for token in self.tokens] == list(reply.logprobs)


def finish(batch: LiveBatch) -> None:
    while batch.step():
        pass
    assert (batch.waiting, batch.running) == (0, 0)


# -- each reply is that of its request alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2"])
def test_a_reply_depends_on_its_request_and_seed_alone(family: str) -> None:
    """Requests arrive at random steps, and some are cancelled while they wait, run, or after their end."""
    backbone, dice = trained(family), random.Random(5)
    # The longest prompt with its reply has exactly 24 tokens, so the columns move to both sides.
    batch = LiveBatch(backbone, "policy", places=3, max_tokens=24)
    clients: list[Client] = []
    cancelled: list[Client] = []
    requests = some_requests(20, longest=12)
    while requests or batch.waiting or batch.running:
        while requests and dice.random() < 0.4:
            clients.append(Client(batch, requests.pop(), seed=len(clients)))
        if clients and dice.random() < 0.05:
            cancelled.append(dice.choice(clients))
            batch.cancel(cancelled[-1].ticket)
        batch.step()
        assert batch.running <= 3
    assert any(not client.replies for client in cancelled)
    for client in clients:
        if client.replies or client not in cancelled:
            client.check(alone(backbone, client.request, client.seed))


@pytest.mark.parametrize("family", ["mamba", "mistral", "guide"])
def test_without_joining_requests_wait_for_the_end_of_the_batch(family: str) -> None:
    backbone = trained("llama" if family == "guide" else family)
    options: dict[str, Any] = {}
    if family == "guide":
        backbone.roles.add("advice")
        tiny_models.scramble(backbone, "advice", seed=3, size=0.1)
        options["guide"] = Guide(("advice",), 0.5)
    # Two requests at a time: with a guide, each has two rows.
    batch = LiveBatch(backbone, "policy", places=4 if family == "guide" else 2, max_tokens=24, **options)
    clients = [Client(batch, request, seed) for seed, request in enumerate(some_requests(7, longest=10))]
    while batch.step():
        done = [bool(client.replies) for client in clients]
        # Pairs run one after the other.
        assert batch.waiting == 0 or all(done[: 2 * (sum(done) // 2)])
    for client in clients:
        client.check(alone(backbone, client.request, client.seed, **options))


def test_thinking_has_its_limit_and_is_hidden() -> None:
    backbone, thinking = trained("llama"), ThinkingTokens(frozenset({5, 6}), frozenset({9, 10}), 6)
    batch = LiveBatch(backbone, "policy", places=4, max_tokens=24, thinking=thinking)
    clients = [Client(batch, Request(Prompt((7, 5))), seed, limit=4) for seed in range(8)]
    finish(batch)
    for client in clients:
        client.check(alone(backbone, client.request, client.seed, 4, thinking=thinking))
    assert any(client.replies[0].thinking_ids for client in clients)


def test_a_request_can_do_without_thinking() -> None:
    """Its stop string ends it inside of what is a chain of thought to the others, and its limit is that of all tokens."""
    backbone, thinking = trained("llama", eos=()), ThinkingTokens(frozenset({5, 6}), frozenset({9, 10}), 6)
    batch = LiveBatch(backbone, "policy", places=8, max_tokens=24, thinking=thinking)
    requests = [Request(Prompt((7, 5))), Request(Prompt((7, 5)), stop_strings=(">", "+"))]
    clients = [Client(batch, requests[seed % 2], seed, thinks=False) for seed in range(6)]
    others = [Client(batch, requests[seed % 2], seed) for seed in range(6)]
    finish(batch)
    for client, other in zip(clients, others, strict=True):
        client.check(alone(backbone, client.request, client.seed))
        other.check(alone(backbone, other.request, other.seed, thinking=thinking))
    assert any(c.replies[0].finished and not o.replies[0].finished for c, o in zip(clients, others, strict=True))


def test_the_likeliest_tokens_are_reported_at_the_temperature_of_the_request() -> None:
    backbone = trained("llama")
    batch = LiveBatch(backbone, "policy", places=3, max_tokens=24)
    asked = [
        Client(batch, Request(Prompt((5, 9)), temperature, top_k=2), 3, top=top)
        for temperature, top in ((0.6, 3), (1.0, 0), (0.0, 1))
    ]
    finish(batch)
    for client, count in zip(asked, (3, 0, 1), strict=True):
        with backbone.acting_as("policy"):
            full = tiny_models.full_logprobs(backbone.model, (5, 9, *client.replies[0].ids), client.request.temperature or 1.0)
        for step, token in enumerate(client.tokens):
            expected = full[1 + step].topk(count)
            assert [i for i, _ in token.top] == expected.indices.tolist()
            assert [p for _, p in token.top] == pytest.approx(expected.values.tolist(), abs=1e-4)


def test_requests_join_at_the_next_step_and_share_their_prompt() -> None:
    backbone = trained("llama", eos=())
    batch = LiveBatch(backbone, "policy", places=16, max_tokens=24)
    first = Client(batch, Request(Prompt((5, 9, 2))), 0)
    batch.step()
    with count_tokens() as tally:
        late = [Client(batch, Request(Prompt((7, 4))), seed) for seed in (1, 2, 3)]
        batch.step()
    # A single free place is enough, and the prompt is read once.
    assert [len(client.tokens) for client in (first, *late)] == [2, 1, 1, 1]
    assert (tally.read, tally.written) == (2, 4)


def test_tokens_are_counted_as_by_generate() -> None:
    backbone = trained("llama")
    requests = [Request(Prompt(p)) for p in ((5, 9), (7,), (4, 4, 4))]
    with count_tokens() as expected:
        for seed, request in enumerate(requests):
            alone(backbone, request, seed)
    batch = LiveBatch(backbone, "policy", places=2, max_tokens=24)
    with count_tokens() as found:
        for seed, request in enumerate(requests):
            batch.add(request, seed=seed, limit=LIMIT)
        finish(batch)
    assert found == expected


def test_a_role_that_is_replaced_between_requests_is_followed() -> None:
    backbone = trained("llama")
    batch = LiveBatch(backbone, "policy", places=2, max_tokens=24)
    Client(batch, Request(Prompt((5, 9))), 0)
    finish(batch)
    backbone.roles.remove("policy")  # the last role: its modules are replaced by plain ones, and then by new ones
    backbone.roles.add("policy")
    tiny_models.scramble(backbone, "policy", seed=9, size=0.3)
    client = Client(batch, Request(Prompt((5, 9))), 0)
    finish(batch)
    client.check(alone(backbone, client.request, 0))


# -- leaving --------------------------------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_place_and_is_not_reported() -> None:
    backbone = trained("llama", eos=())
    batch = LiveBatch(backbone, "policy", places=1, max_tokens=24)
    first, second, third = (Client(batch, Request(Prompt((5, 9))), seed) for seed in range(3))
    batch.step()
    assert (batch.running, batch.waiting) == (1, 2)
    batch.cancel(first.ticket)
    batch.cancel(second.ticket)
    batch.cancel(second.ticket)
    batch.step()
    assert (len(first.tokens), second.tokens, len(third.tokens)) == (1, [], 1)
    finish(batch)
    batch.cancel(third.ticket)
    assert first.replies == second.replies == []
    third.check(alone(backbone, third.request, 2))


def test_callbacks_may_cancel_and_add() -> None:
    backbone = trained("llama", eos=())
    batch = LiveBatch(backbone, "policy", places=2, max_tokens=24)
    more: list[Client] = []

    def stop(token: NewToken) -> None:
        batch.cancel(client.ticket)
        more.append(Client(batch, Request(Prompt((7,))), 4))

    client = Client(batch, Request(Prompt((5, 9))), 0, limit=1, on_token=stop)
    assert batch.step()
    finish(batch)
    assert client.replies == []  # its only token was its last
    more[0].check(alone(backbone, more[0].request, 4))


def test_nothing_is_left_of_requests_that_have_ended_or_were_cancelled() -> None:
    backbone = trained("llama")
    batch = LiveBatch(backbone, "policy", places=4, max_tokens=24)
    rows, sizes = [], set()
    for number in range(60):
        ticket = batch.add(Request(Prompt((5, 9, 2)[: 1 + number % 3])), seed=number, limit=4)
        assert ticket.row is not None
        rows.append(weakref.ref(ticket.row))
        if number % 7 == 0:
            batch.cancel(ticket)
        del ticket
        batch.step()
        sizes.add(batch.cache_bytes)
    finish(batch)
    gc.collect()
    assert [row for row in rows if row() is not None] == []
    assert {size for size in sizes if size} == {batch.cache_bytes}
    # Two layers, keys and values of 2 heads of 8 numbers in fp32, for 4 rows of 24 tokens and an eighth more.
    assert batch.cache_bytes == 2 * 2 * 2 * 8 * 4 * 4 * 27


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scarcity", [{"rows": 2}, {"tokens": 9}, {"rows": 2, "written": 8}], ids=lambda s: "-".join(s))
def test_out_of_memory_loses_no_token_and_halves_the_places(scarcity: dict[str, int]) -> None:
    backbone = trained("llama")
    requests = some_requests(12, longest=6)
    expected = [alone(backbone, request, seed) for seed, request in enumerate(requests)]
    batch = LiveBatch(backbone, "policy", places=8, max_tokens=24)
    clients = []
    with no_memory(backbone, **scarcity) as failed:
        for seed, request in enumerate(requests):
            clients.append(Client(batch, request, seed))
            if seed % 3 == 2:
                batch.step()
        finish(batch)
    assert failed
    assert batch.places < 8
    for client, reply in zip(clients, expected, strict=True):
        client.check(reply)
    first, *_ = backbone.budget.take_events()
    assert (first.phase.value, first.kind.value, first.before, first.after) == ("rollout", "out_of_memory", 8, 4)


def test_a_request_that_does_not_fit_alone_fails_and_the_others_do_not() -> None:
    backbone = trained("llama")
    batch = LiveBatch(backbone, "policy", places=2, max_tokens=24)
    with no_memory(backbone, tokens=5):
        small, large, last = (Client(batch, Request(Prompt((5,) * size)), 0) for size in (2, 6, 3))
        finish(batch)
    (error,) = large.errors
    assert isinstance(error, MemoryLimitError)
    assert large.ticket.error is error
    assert large.replies == []
    for client in (small, last):
        client.check(alone(backbone, client.request, 0))


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_a_row_with_nan_logits_fails_alone(family: str) -> None:
    backbone = trained(family, tie_word_embeddings=False)
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[39] = float("nan")
    batch = LiveBatch(backbone, "policy", places=3, max_tokens=24)
    clients = [Client(batch, Request(Prompt(p)), 3) for p in ((5, 9), (7, 39), (4,), (6, 2))]
    finish(batch)
    (error,) = clients[1].errors
    assert isinstance(error, NotFiniteError)
    assert str(error) == "the logits for token 1 of this reply are NaN or infinite"
    assert (clients[1].tokens, clients[1].replies) == ([], [])
    for client in (clients[0], *clients[2:]):
        client.check(alone(backbone, client.request, 3))


def broken_kernel(*arguments: Any) -> None:
    raise RuntimeError("a broken kernel")


def test_after_another_error_the_requests_wait_again(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained("llama", eos=())
    batch = LiveBatch(backbone, "policy", places=1, max_tokens=24)
    first, second = (Client(batch, Request(Prompt((5, 9))), seed) for seed in range(2))
    batch.step()
    with monkeypatch.context() as patch:
        patch.setattr("selfeval.rollout.rows.pick", broken_kernel)
        with pytest.raises(RuntimeError, match="a broken kernel"):
            batch.step()
    assert (batch.running, batch.waiting) == (0, 2)
    finish(batch)
    for client in (first, second):
        client.check(alone(backbone, client.request, client.seed))


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (
            (5,) * 20,
            {"limit": 5},
            "a prompt of 20 tokens and a reply of up to 5 exceed the limit of 24 .* at most 4 new tokens",
        ),
        ((), {}, "tokens of the prompt: 0; must be at least 1"),
        ((5,), {"limit": 0}, "limit: 0; must be at least 1"),
        ((5,), {"seed": -1}, r"seed: -1; must be from 0 to 18446744073709551615"),
        ((5,), {"top": 41}, "top: 41; must be from 0 to 40"),
    ],
)
def test_requests_out_of_range_are_refused(prompt: tuple[int, ...], arguments: dict[str, int], message: str) -> None:
    batch = LiveBatch(trained("llama"), "policy", places=1, max_tokens=24)
    with pytest.raises(InputError, match=message):
        batch.add(Request(Prompt(prompt)), **{"seed": 0, "limit": 4, **arguments})
    assert batch.waiting == 0


def test_sizes_roles_context_and_images_are_checked() -> None:
    backbone = trained("llama", max_position_embeddings=16)
    assert LiveBatch(backbone, BASE, places=1, max_tokens=100).max_tokens == 16
    with pytest.raises(InputError, match=r"places=0: must be at least 1"):
        LiveBatch(backbone, "policy", places=0, max_tokens=4)
    with pytest.raises(RoleError):
        LiveBatch(backbone, "nobody", places=1, max_tokens=4)
    with pytest.raises(ModelError, match="contains an image"):
        LiveBatch(backbone, BASE, places=1, max_tokens=9).add(Request(Prompt((5,), (Image(b"one"),))), seed=0, limit=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("limit", 0), ("stream", -1), ("stop_strings", ("",)),
    ],
)  # fmt: skip
def test_sampling_parameters_are_checked(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}="):
        Request(Prompt((5,)), **{name: value})
