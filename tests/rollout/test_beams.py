from __future__ import annotations

import pytest
import torch

import tiny_models
from scarce import no_memory
from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.errors import LoopError
from selfeval.rollout.beams import beam_search
from token_prompts import as_prompts

PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12)]


@pytest.mark.parametrize("role", [BASE, "policy"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_beam_search_returns_what_transformers_finds_for_each_prompt_alone(family: str, role: str) -> None:
    ends = (1, 20, 21, 22, 23)
    backbone = tiny_models.backbone(family, eos=ends)
    backbone.roles.add("policy")
    tiny_models.scramble(backbone, "policy", size=0.1)
    with backbone.acting_as(role):
        rollouts = beam_search(backbone, as_prompts(PROMPTS), beams=4, max_new_tokens=10, batch_size=3)
        for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
            out = backbone.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                num_beams=4, do_sample=False, max_new_tokens=10, pad_token_id=0, eos_token_id=list(ends),
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert list(rollout.ids) == out
            assert rollout.finished == (out[-1] in ends)
            full = tiny_models.full_logprobs(backbone.model, (*prompt, *out))
            expected = [full[len(prompt) - 1 + i, token].item() for i, token in enumerate(out)]
            assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def test_out_of_memory_changes_no_reply() -> None:
    backbone = tiny_models.backbone("llama", eos=(1, 20, 21, 22, 23))
    prompts = PROMPTS * 3
    with backbone.acting_as(BASE):
        expected = beam_search(backbone, as_prompts(prompts), beams=4, max_new_tokens=10)
        with no_memory(backbone, rows=12) as failed:
            found = beam_search(backbone, as_prompts(prompts), beams=4, max_new_tokens=10)
    assert failed
    assert [(r.ids, r.finished) for r in found] == [(r.ids, r.finished) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    first, *_ = backbone.budget.take_events()
    assert (first.phase.value, first.kind.value, first.before, first.after) == ("beams", "out_of_memory", 48, 24)


def test_a_wider_beam_finds_a_likelier_reply_than_greedy() -> None:
    backbone = tiny_models.backbone("llama", eos=())
    with backbone.acting_as(BASE):
        wide = beam_search(backbone, as_prompts(PROMPTS), beams=8, max_new_tokens=6)
        greedy = [
            backbone.model.generate(
                input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), do_sample=False,
                max_new_tokens=6, pad_token_id=0,
            )[0, len(p) :].tolist()
            for p in PROMPTS
        ]  # fmt: skip
        sums = []
        for prompt, ids in zip(PROMPTS, greedy, strict=True):
            full = tiny_models.full_logprobs(backbone.model, (*prompt, *ids))
            sums.append(sum(full[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)))
    found = [sum(r.logprobs) for r in wide]
    assert all(a >= b - 1e-4 for a, b in zip(found, sums, strict=True))
    assert any(a > b + 1e-2 for a, b in zip(found, sums, strict=True))
    assert [r.finished for r in wide] == [False] * len(PROMPTS)


def test_a_models_own_generation_defaults_change_nothing() -> None:
    found = []
    for own in ({}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1, "length_penalty": 3.0}):
        backbone = tiny_models.backbone("llama")
        backbone.model.generation_config.update(**own)
        with backbone.acting_as(BASE):
            found.append(beam_search(backbone, as_prompts(PROMPTS), beams=4, max_new_tokens=10))
        assert {name: getattr(backbone.model.generation_config, name) for name in own} == own  # they are still the model's
        if own:  # and they would have changed something
            replies = [_beams_of_transformers(backbone, prompt) for prompt in PROMPTS]
            assert replies != [list(rollout.ids) for rollout in found[0]]
    assert found[1] == found[0]
    assert found[2] == found[0]


def _beams_of_transformers(backbone: Backbone, prompt: tuple[int, ...], limit: int = 10) -> list[int]:
    """Return the reply of transformers' beam search to one prompt alone, under the model's own generation defaults."""
    ids, attention = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
    options = {"num_beams": 4, "do_sample": False, "max_new_tokens": limit, "pad_token_id": 0}
    with backbone.acting_as(BASE):
        found: list[int] = backbone.model.generate(input_ids=ids, attention_mask=attention, **options)[
            0, len(prompt) :
        ].tolist()
    return found


CONTEXT = 16


@pytest.mark.parametrize("length", range(10, 16))
def test_a_prompt_near_the_end_of_the_context_gets_what_fits(length: int) -> None:
    backbone = tiny_models.backbone("gpt2", eos=(), n_positions=CONTEXT)
    prompt = tuple(range(2, 2 + length))
    with backbone.acting_as(BASE):
        (rollout,) = beam_search(backbone, as_prompts([prompt]), beams=4, max_new_tokens=10)
        full = tiny_models.full_logprobs(backbone.model, (*prompt, *rollout.ids))
    assert len(rollout.ids) == min(10, CONTEXT - length)
    assert not rollout.finished
    assert list(rollout.ids) == _beams_of_transformers(backbone, prompt, min(10, CONTEXT - length))
    expected = [full[length - 1 + t, token].item() for t, token in enumerate(rollout.ids)]
    assert rollout.logprobs == pytest.approx(expected, abs=1e-4)


def test_long_and_short_prompts_side_by_side_stay_inside_the_context() -> None:
    backbone = tiny_models.backbone("gpt2", n_positions=CONTEXT)
    prompts = [tuple(range(2, 2 + length)) for length in (15, 1, 14, 8, 12)]
    with backbone.acting_as(BASE):
        rollouts = beam_search(backbone, as_prompts(prompts), beams=4, max_new_tokens=10, batch_size=64)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        assert 1 <= len(rollout.ids) <= min(10, CONTEXT - len(prompt))


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    backbone = tiny_models.backbone("gpt2", n_positions=CONTEXT)
    with backbone.acting_as(BASE), pytest.raises(LoopError, match=r"a prompt of 16 tokens leaves no room .* context of 16"):
        beam_search(backbone, as_prompts([(5, 9), tuple(range(2, 18))]), beams=4, max_new_tokens=10)
