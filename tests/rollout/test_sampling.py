"""Filters of the sampling distribution, against transformers' own, and their effect on sampled replies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.rollout.sampling import Filters, nucleus

NEVER = float("-inf")
SETTINGS: list[dict[str, Any]] = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 4, "top_p": 0.7},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.15},
    {},
]


def theirs(logits_BV: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The distribution that transformers' `generate` samples from with these settings."""
    warpers: list[Any] = []
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    ids = torch.zeros(len(logits_BV), 1, dtype=torch.long)
    for warper in warpers:
        logits_BV = warper(ids, logits_BV)
    return logits_BV.softmax(-1)


def test_the_likeliest_token_stays_in_a_nucleus_that_is_0_in_fp32() -> None:
    logprobs_BV = torch.tensor([[0.2, 0.5, 0.3]]).log()
    found_BV = nucleus(logprobs_BV, torch.tensor([5e-324]))
    assert found_BV.isfinite().tolist() == [[False, True, False]]


def test_each_row_has_the_distribution_that_transformers_has_with_its_settings() -> None:
    torch.manual_seed(0)
    logits_BV = 2 * torch.randn(len(SETTINGS), 30)
    # All in one batch, so that a row must not take the settings of another; the batch is in another order than its requests.
    filters = Filters([Request(Prompt((5,)), **settings) for settings in SETTINGS], torch.device("cpu"))
    rows = list(reversed(range(len(SETTINGS))))
    filters.select(torch.tensor(rows))
    found = filters.allowed(logits_BV.log_softmax(-1)).softmax(-1)
    for place, row in enumerate(rows):
        torch.testing.assert_close(found[place : place + 1], theirs(logits_BV[place : place + 1], SETTINGS[row]))
    assert (found[rows.index(0)] > 0).sum() == 3


def test_the_bits_of_a_row_do_not_depend_on_the_filters_of_the_others() -> None:
    torch.manual_seed(0)
    logprobs_BV = (2 * torch.randn(40, 30)).log_softmax(-1)
    nucleus = Request(Prompt((5,)), top_p=0.8)
    mixed = Filters([*[nucleus] * 39, Request(Prompt((5,)), top_k=3, min_p=0.1)], torch.device("cpu"))
    uniform = Filters([nucleus] * 40, torch.device("cpu"))
    assert torch.equal(mixed.allowed(logprobs_BV)[:-1], uniform.allowed(logprobs_BV)[:-1])


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    logits_BV, ids = torch.randn(2, 20), torch.tensor([[3, 4, 3], [7, 8, 9]])
    seen_BV = torch.zeros(2, 20, dtype=torch.bool).scatter_(1, ids, True)
    filters = Filters([Request(Prompt((5,)), repetition_penalty=p) for p in (1.0, 1.7)], torch.device("cpu"))
    found = filters.penalized(logits_BV, seen_BV)
    torch.testing.assert_close(found[:1], logits_BV[:1])
    torch.testing.assert_close(found[1:], RepetitionPenaltyLogitsProcessor(1.7)(ids[1:], logits_BV[1:]))


def sample(requests: list[Request], **options: Any) -> list[Rollout]:
    backbone = tiny_models.backbone("llama", 40, eos=())
    with backbone.acting_as(BASE):
        return generate(backbone, requests, max_new_tokens=12, seed=4, **options)


def test_greedy_with_a_penalty_equals_transformers_also_for_rows_that_join_later() -> None:
    backbone = tiny_models.backbone("llama", 40, eos=())
    prompts = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12), (5, 9, 2, 14)]
    requests = [Request(Prompt(p), 0.0, repetition_penalty=1.0 + 0.4 * (i % 2)) for i, p in enumerate(prompts)]
    found = sample(requests, batch_size=2)
    for request, rollout in zip(requests, found, strict=True):
        with backbone.acting_as(BASE):
            expected = backbone.model.generate(
                input_ids=torch.tensor([request.prompt.ids]), do_sample=False, max_new_tokens=12, eos_token_id=None,
                pad_token_id=0, repetition_penalty=request.repetition_penalty,
            )  # fmt: skip
        assert rollout.ids == tuple(expected[0, len(request.prompt.ids) :].tolist())
    assert len(set(found[1].ids)) > len(set(sample([Request(Prompt((7,)), 0.0)])[0].ids))


def test_logprobs_are_those_of_the_unfiltered_distribution() -> None:
    prompt = Prompt((5, 9, 2))
    (rollout,) = sample([Request(prompt, 0.8, top_k=2, min_p=0.1, repetition_penalty=1.5)])
    backbone = tiny_models.backbone("llama", 40, eos=())
    ids = torch.tensor([[*prompt.ids, *rollout.ids]])
    with backbone.acting_as(BASE), torch.no_grad():
        logits = backbone.model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1]
    expected = (logits / 0.8).log_softmax(-1).gather(1, ids[0, len(prompt.ids) :, None])[:, 0]
    assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"min_p": 1.0}, {"temperature": 0.3, "top_k": 1}], ids=str)
def test_one_token_that_is_left_is_the_likeliest(settings: dict[str, Any]) -> None:
    prompts = [Prompt((5, 9, 2)), Prompt((7,))]
    greedy = sample([Request(p, 0.0) for p in prompts])
    assert [r.ids for r in sample([Request(p, **settings) for p in prompts])] == [r.ids for r in greedy]


def test_temperature_comes_before_the_filters() -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 0.0]])
    filters = Filters([Request(Prompt((5,)), temperature=0.5, min_p=0.2)], torch.device("cpu"))
    found = filters.allowed((logits_BV / 0.5).log_softmax(-1))
    ids = torch.zeros(1, 1, dtype=torch.long)
    expected = MinPLogitsWarper(0.2)(ids, TemperatureLogitsWarper(0.5)(ids, logits_BV))
    # exp(-2) = 0.135 of the likeliest is below 0.2; at temperature 1 it would be exp(-1) = 0.37.
    assert found.isneginf().tolist() == expected.isneginf().tolist() == [[False, True, True]]
