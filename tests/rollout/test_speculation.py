"""Drafts in the open batch: replies equal those of plain decoding, token for token in fp32, and log-probs to 1e-5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from chi_square import chi_square_p
from family_checks import make_two_roles
from scarce import no_memory
from selfeval.backbone.adapters import BASE
from selfeval.backbone.families.cache import appends_rows
from selfeval.backbone.roles import Backbone
from selfeval.prompt import Prompt
from selfeval.rollout.drafts import Speculation
from selfeval.rollout.engine import generate
from selfeval.rollout.live import LiveBatch, NewToken
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.rows import Rows
from selfeval.rollout.thinking import ThinkingTokens
from tiny_families import FAMILIES

ENDS = (1, 20)
LIMIT = 24
PROMPT = Prompt((5, 9, 2, 14, 22, 13, 14, 15, 3, 2))
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.3},
    "penalty": {"repetition_penalty": 1.3, "temperature": 0.6},
    "greedy penalty": {"repetition_penalty": 1.2, "temperature": 0.0},
    "stop strings": {"stop_strings": ("e", "to"), "temperature": 0.5},
}


def trained(family: str = "llama", **changes: Any) -> Backbone:
    backbone = tiny_models.backbone(family, eos=changes.pop("eos", ENDS), **changes)
    backbone.roles.add("policy")
    tiny_models.scramble(backbone, "policy", size=0.1)
    return backbone


def opened(backbone: Backbone, speculation: Speculation = Speculation.ON, **options: Any) -> LiveBatch:
    return LiveBatch(backbone, "policy", places=options.pop("places", 1), max_tokens=40, speculation=speculation, **options)


def plain(backbone: Backbone, request: Request, seed: int, limit: int = LIMIT, **options: Any) -> Rollout:
    """The reply of `generate`, which reads no drafts."""
    with backbone.acting_as("policy"):
        return generate(backbone, [replace(request, stream=0)], max_new_tokens=limit, seed=seed, **options)[0]


def answered(batch: LiveBatch, request: Request, seed: int, limit: int = LIMIT, **options: Any) -> Rollout:
    """The reply of the batch to a request that runs alone; each of its tokens is reported once."""
    tokens: list[NewToken] = []
    ticket = batch.add(request, seed=seed, limit=limit, on_token=tokens.append, **options)
    while batch.step():
        pass
    assert ticket.rollout is not None
    assert [(token.id, token.logprob) for token in tokens] == [*zip(ticket.rollout.ids, ticket.rollout.logprobs, strict=True)]
    return ticket.rollout


def check_equal(found: Rollout, expected: Rollout) -> None:
    assert (found.ids, found.finished, found.hidden) == (expected.ids, expected.finished, expected.hidden)
    # A low temperature scales the rounding errors of the logits, which are about 1e-6.
    assert found.logprobs == pytest.approx(expected.logprobs, abs=5e-5)


def asked() -> Iterator[tuple[Request, int]]:
    """Requests of one prompt: with every setting twice in turn and from few seeds, so that drafts are right and wrong."""
    for turn in range(2):
        for settings in SETTINGS.values():
            for seed in range(2):
                yield Request(PROMPT, **settings), seed + turn


def drafted_and_equal(backbone: Backbone) -> LiveBatch:
    batch = opened(backbone)
    for request, seed in asked():
        check_equal(answered(batch, request, seed), plain(backbone, request, seed))
    return batch


def test_replies_are_those_of_plain_decoding_with_every_setting() -> None:
    batch = drafted_and_equal(trained())
    # Correct tokens, and wrong ones.
    assert batch.drafts.read > 2 * batch.drafts.accepted > 200


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_are_those_of_plain_decoding_in_every_family(family: str) -> None:
    backbone = make_two_roles(family)
    backbone.loaded.eos_ids = ()
    batch = opened(backbone)
    for temperature in (0.7, 0.0):
        request = Request(Prompt((5, 9, 2, 14, 22, 13)), temperature)
        for _ in range(2):  # the second one is drafted from the first
            check_equal(answered(batch, request, 0, 12), plain(backbone, request, 0, 12))
    # Other families keep a state that cannot drop the tokens of a wrong draft.
    assert (batch.drafts.accepted > 0) == appends_rows(backbone.loaded)


def test_a_repeated_request_is_read_in_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained(eos=())
    batch, request, steps = opened(backbone), Request(PROMPT), 0
    first = answered(batch, request, 0)
    batch.drafts.read = batch.drafts.accepted = 0
    ticket = batch.add(request, seed=0, limit=LIMIT)
    while batch.step():
        steps += 1
    assert ticket.rollout is not None
    check_equal(ticket.rollout, first)
    # 24 tokens: one after the prompt, then drafts of 4, 8 and 7 tokens, each with one more token. The last is one token
    # shorter than what is left.
    assert (steps + 1, batch.drafts.read, batch.drafts.accepted) == (4, 4 + 8 + 8, 4 + 8 + 8)


def test_an_end_in_the_middle_of_a_draft_ends_the_reply() -> None:
    """Without ends, the earlier reply continues behind the token that ends the reply now."""
    backbone = trained(eos=())
    batch = opened(backbone)
    whole = answered(batch, Request(PROMPT), 0)
    for place in range(2, 12):
        backbone.loaded.eos_ids = (whole.ids[place],)
        again = opened(backbone)
        again._earlier = batch._earlier  # its prompt with the reply that went on
        check_equal(answered(again, Request(PROMPT), 0), plain(backbone, Request(PROMPT), 0))
        assert again.drafts.accepted > 0


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 24])
def test_the_limit_is_kept_and_the_cache_needs_no_more_columns(limit: int) -> None:
    backbone = trained(eos=())
    request = Request(PROMPT)
    # Exactly the prompt with its reply: a draft that is written beyond it fails, except in the slack of an eighth.
    batch = LiveBatch(backbone, "policy", places=1, max_tokens=len(PROMPT.ids) + limit, speculation=Speculation.ON)
    for _ in range(3):
        check_equal(answered(batch, request, 0, limit), plain(backbone, request, 0, limit))
        assert batch._rows is not None
        layer: Any = batch._rows.passes[0].cache.layers[0]
        assert layer._whole is None or layer._whole[0].shape[2] == batch.max_tokens + batch.max_tokens // 8


def test_requests_join_and_leave_between_drafts() -> None:
    backbone = trained(eos=())
    batch = opened(backbone, places=3)
    request, others = Request(PROMPT, 0.7), [Request(Prompt((7, 3, 8, 8)), 0.9), Request(Prompt(tuple(range(2, 16))))]
    answered(batch, request, 0)  # drafts for the next one
    for delay in range(1, 6):
        main = batch.add(request, seed=0, limit=LIMIT)
        for _ in range(delay):
            batch.step()
        read = batch.drafts.read
        tickets = [batch.add(other, seed=delay, limit=3 + delay) for other in others]
        batch.step()
        assert batch.drafts.read == read  # none while others join
        batch.cancel(batch.add(others[0], seed=9, limit=20))
        while batch.step():
            pass
        assert batch.drafts.read > read or delay > 2
        assert main.rollout is not None
        check_equal(main.rollout, plain(backbone, request, 0))
        for ticket, other in zip(tickets, others, strict=True):
            assert ticket.rollout is not None
            check_equal(ticket.rollout, plain(backbone, other, delay, 3 + delay))


def test_a_request_that_is_cancelled_by_a_token_of_a_draft_gets_no_more() -> None:
    backbone = trained(eos=())
    batch, request = opened(backbone), Request(PROMPT)
    answered(batch, request, 0)
    seen: list[int] = []

    def stop(token: NewToken) -> None:
        seen.append(token.id)
        if len(seen) == 3:
            batch.cancel(ticket)

    ticket = batch.add(request, seed=0, limit=LIMIT, on_token=stop)
    while batch.step():
        pass
    assert (len(seen), ticket.rollout, batch.running) == (3, None, 0)
    check_equal(answered(batch, request, 0), plain(backbone, request, 0))


def test_thinking_and_likeliest_tokens_are_those_of_plain_decoding() -> None:
    backbone = trained(eos=())
    whole = plain(backbone, Request(PROMPT), 0)
    thinking = ThinkingTokens(frozenset({whole.ids[2]}), frozenset({whole.ids[7]}), limit=10)
    replies: list[list[NewToken]] = []
    for speculation in (Speculation.OFF, Speculation.ON):
        batch = opened(backbone, speculation, thinking=thinking)
        for _ in range(2):
            tokens: list[NewToken] = []
            batch.add(Request(PROMPT), seed=0, limit=12, top=3, on_token=tokens.append)
            while batch.step():
                pass
            replies.append(tokens)
    assert batch.drafts.accepted > 5
    for tokens in replies[1:]:
        assert [token.id for token in tokens] == [token.id for token in replies[0]]
        for token, expected in zip(tokens, replies[0], strict=True):
            assert [i for i, _ in token.top] == [i for i, _ in expected.top]
            assert [p for _, p in token.top] == pytest.approx([p for _, p in expected.top], abs=1e-5)


def test_drafts_are_given_up_when_they_need_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backbone, "decode_step", lambda self: None)  # which does not call the layers that run out of memory
    backbone = trained(eos=())
    batch, request = opened(backbone, places=2), Request(PROMPT)
    answered(batch, request, 0)
    ticket = batch.add(request, seed=0, limit=LIMIT)
    batch.step()
    with no_memory(backbone, tokens=1) as failed:
        batch.step()
        assert failed == [(1, 5)]
    read, places = batch.drafts.read, batch.places
    while batch.step():
        pass
    assert ticket.rollout is not None
    check_equal(ticket.rollout, plain(backbone, request, 0))
    assert (batch.drafts.read, places) == (read, 2)


def test_after_an_error_in_a_draft_its_first_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained(eos=())
    batch, request = opened(backbone), Request(PROMPT)
    answered(batch, request, 0)
    tokens: list[NewToken] = []
    ticket = batch.add(request, seed=0, limit=LIMIT, on_token=tokens.append)
    batch.step()
    draw, calls = Rows.draw, []

    def broken(rows: Rows, logits_NBV: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) >= 3:
            raise RuntimeError("a broken kernel")
        return draw(rows, logits_NBV)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "draw", broken)
        batch.step()
        assert len(tokens) == 3
        with pytest.raises(RuntimeError, match="a broken kernel"):
            batch.step()
    while batch.step():
        pass
    assert ticket.rollout is not None
    check_equal(ticket.rollout, plain(backbone, request, 0))
    assert len(tokens) == LIMIT


def test_off_reads_no_drafts_and_auto_does_while_they_are_correct() -> None:
    backbone = trained(eos=())
    counts = {}
    for speculation in Speculation:
        batch = opened(backbone, speculation)
        for _ in range(2):
            check_equal(answered(batch, Request(PROMPT), 0), plain(backbone, Request(PROMPT), 0))
        counts[speculation] = batch.drafts.accepted
    assert counts[Speculation.OFF] == 0
    assert counts[Speculation.ON] >= counts[Speculation.AUTO] >= 20


def test_sampling_with_drafts_has_the_exact_distribution() -> None:
    """Second and third tokens are drafted from the last replies; taking a draft without a draw would repeat those."""
    backbone = tiny_models.backbone("llama", 6, eos=())
    prompt, count = (5, 2, 3), 800
    batch = LiveBatch(backbone, BASE, places=1, max_tokens=8, speculation=Speculation.ON)
    counts = torch.zeros(6, 6, 6, dtype=torch.float64)
    for seed in range(count):
        ticket = batch.add(Request(Prompt(prompt)), seed=seed, limit=3)
        while batch.step():
            pass
        assert ticket.rollout is not None
        counts[ticket.rollout.ids] += 1
    assert batch.drafts.read > count / 2
    with backbone.acting_as(BASE):

        def after(*ids: int) -> Tensor:
            return tiny_models.full_logprobs(backbone.model, (*prompt, *ids), 1.0)[-1].exp().double()

        second = torch.stack([torch.stack([after(a, b) for b in range(6)]) for a in range(6)])
        pairs = after()[:, None] * torch.stack([after(a) for a in range(6)])
    assert chi_square_p(counts.flatten(), (pairs[..., None] * second).flatten()) > 1e-4
