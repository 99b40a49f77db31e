"""Log-probs of tokens right after prompts equal those that sampling records, whatever the prompts share."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

import tiny_models
from scarce import no_memory
from selfeval.backbone.shared_prefixes import PrefixLayout
from selfeval.errors import LoopError
from selfeval.prompt import Prompt
from selfeval.rollout import next_tokens
from selfeval.rollout.engine import count_tokens, generate
from selfeval.rollout.next_tokens import next_logprobs, shared_starts
from selfeval.rollout.requests import Request

RULES, QUESTIONS = (5, 9, 2, 7, 7, 8), ((11, 12, 13), (14, 15))
REPLIES = ((20, 21), (22,), (23, 24, 25))
PROMPTS = [
    Prompt((*RULES, *question, *a, 30, *b)) for question in QUESTIONS for a in REPLIES for b in REPLIES if a != b
] + [Prompt((31, 32)), Prompt((*RULES, 3))]  # fmt: skip
WATCH = (3, 17, 30)


def sampled(backbone: object, role: str) -> list[tuple[float, ...]]:
    requests = [Request(prompt, 0.0) for prompt in PROMPTS]
    with backbone.acting_as(role):  # type: ignore[attr-defined]
        return [r.watched[0] for r in generate(backbone, requests, max_new_tokens=1, seed=0, watch=WATCH)]  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_they_are_those_that_sampling_records(family: str) -> None:
    backbone = tiny_models.backbone(family, 40)
    backbone.roles.add("policy")
    tiny_models.scramble(backbone, "policy", size=0.1)
    expected = sampled(backbone, "policy")
    with backbone.acting_as("policy"):
        for batch_size in (1, 3, 256):
            found = next_logprobs(backbone, PROMPTS, WATCH, batch_size=batch_size)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)


def test_few_shared_tokens_are_read_with_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_models.backbone("llama", 40)
    assert backbone.shares_prefixes(16)
    monkeypatch.setattr(type(backbone), "layout_hidden", lambda self, layout: pytest.fail("read in the shared layout"))
    prompts = [Prompt((5, 9, *range(n, n + 6))) for n in (10, 20, 30)]  # 2 + 3 x 6 of 24 tokens
    with backbone.acting_as("base"):
        next_logprobs(backbone, prompts, WATCH, batch_size=256)


def test_shared_starts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_models.backbone("llama", 40)
    read: list[int] = []
    layout_hidden = type(backbone).layout_hidden

    def noted(self: object, layout: PrefixLayout) -> torch.Tensor:
        hidden_ND = layout_hidden(self, layout)  # type: ignore[arg-type]
        read.append(len(hidden_ND))
        return hidden_ND

    monkeypatch.setattr(type(backbone), "layout_hidden", noted)
    with backbone.acting_as("base"), count_tokens() as tally:
        next_logprobs(backbone, PROMPTS[:6], WATCH, batch_size=256)
    # The rules and the question once, then 2 + 1 + 3 tokens of replies in every order, with a token between them.
    # The last pass; before it, sharing is measured on short texts.
    assert read[-1:] == [6 + 3 + sum(len(a) + 1 + len(b) for a in REPLIES for b in REPLIES if a != b)]
    assert tally.read == sum(len(prompt.ids) for prompt in PROMPTS[:6])
    assert tally.written == 0


def test_less_memory_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_models.backbone("llama", 40)
    expected = sampled(backbone, "base")
    monkeypatch.setattr(type(backbone), "shares_prefixes", lambda self, longest: False)
    with no_memory(backbone, rows=3) as failed, backbone.acting_as("base"):
        found = next_logprobs(backbone, PROMPTS, WATCH, batch_size=256)
    assert failed
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    backbone = tiny_models.backbone("llama", 40, max_position_embeddings=8)
    with backbone.acting_as("base"), pytest.raises(LoopError, match="context of 8"):
        next_logprobs(backbone, [Prompt((5,) * 9)], WATCH, batch_size=4)


def test_no_prompts() -> None:
    backbone = tiny_models.backbone("llama", 40)
    with backbone.acting_as("base"):
        assert next_logprobs(backbone, [], WATCH, batch_size=4) == []


# -- shared starts --------------------------------------------------------------------------------------------------------


def tokens(ids: list[tuple[int, ...]], starts: list[int]) -> int:
    distinct = {tuple(row[:start]) for row, start in zip(ids, starts, strict=True)}
    return sum(map(len, distinct)) + sum(len(row) - start for row, start in zip(ids, starts, strict=True))


def best(ids: list[tuple[int, ...]]) -> int:
    """The fewest tokens over all ways to cut the sorted sequences into clusters."""
    if not ids:
        return 0
    options = []
    for size in range(1, len(ids) + 1):
        cluster = ids[:size]
        common = next(n for n in range(8, -1, -1) if len({row[:n] for row in cluster}) == 1)
        start = max(1, min(common, *(len(row) - 1 for row in cluster)))
        if all(row[:start] == cluster[0][:start] for row in cluster):
            options.append(start + sum(len(row) - start for row in cluster) + best(ids[size:]))
    return min(options)


def test_starts_are_shared_and_leave_a_token() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = sorted(tuple(rng.randrange(2) for _ in range(rng.randint(2, 7))) for _ in range(rng.randint(1, 6)))
        starts = shared_starts(ids)
        assert all(1 <= start < len(row) for start, row in zip(starts, ids, strict=True))
        assert tokens(ids, starts) <= sum(map(len, ids))
        # One number for the whole group is at most a few tokens worse than the best clusters.
        assert tokens(ids, starts) >= best(ids)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([(1, 2, 3, 4), (1, 2, 3, 5), (1, 7, 7, 7)], [3, 3, 3]),
        ([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 6)], [3, 3, 3]),
        ([(1, 2), (1, 2, 3)], [1, 1]),
        ([(1, 2, 3), (1, 2, 3)], [2, 2]),
        ([(5, 6)], [1]),
    ],
)
def test_the_fewest_tokens_are_chosen(ids: list[tuple[int, ...]], expected: list[int]) -> None:
    assert list(pairwise(ids)) == list(pairwise(sorted(ids)))
    assert shared_starts(ids) == expected


def test_the_size_of_a_pass_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_models.backbone("llama", 40)
    sizes: list[int] = []
    starts = next_tokens.shared_starts
    monkeypatch.setattr(next_tokens, "shared_starts", lambda ids: (sizes.append(sum(map(len, ids))), starts(ids))[1])
    monkeypatch.setattr("selfeval.backbone.budget._PROMPT_PASS_TOKENS", {"cpu": 30})
    with backbone.acting_as("base"):
        next_logprobs(backbone, PROMPTS, WATCH, batch_size=256)
    assert max(sizes) <= 30
    assert len(sizes) > 3
