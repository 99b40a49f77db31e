from __future__ import annotations

import pytest
import torch

import tiny_models
from selfeval.backbone.roles import BASE
from selfeval.rollout.beams import beam_search

PROMPTS = [(5, 9, 2), (7,), (30, 31, 32, 33, 34, 35), (11, 12)]


@pytest.mark.parametrize("role", [BASE, "policy"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_beam_search_returns_what_transformers_finds_for_each_prompt_alone(family: str, role: str) -> None:
    ends = (1, 20, 21, 22, 23)
    backbone = tiny_models.backbone(family, eos=ends)
    backbone.add_role("policy")
    tiny_models.scramble(backbone, "policy", size=0.1)
    with backbone.acting_as(role):
        rollouts = beam_search(backbone, PROMPTS, beams=4, max_new_tokens=10, rows=3)
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


def test_a_wider_beam_finds_a_likelier_reply_than_greedy() -> None:
    backbone = tiny_models.backbone("llama", eos=())
    with backbone.acting_as(BASE):
        wide = beam_search(backbone, PROMPTS, beams=8, max_new_tokens=6)
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
