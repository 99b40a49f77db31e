"""States at a few tokens: equal to those of the whole pass, with less work in the last layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.picked_tokens import agrees_at_picked_tokens, last_mlp
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences, states_at
from selfeval.bench.workloads import add_random_role
from selfeval.prompt import Prompt
from selfeval.training.evaluator import EVALUATOR
from slow import slow
from tiny_families import FAMILIES

PROMPTS = [Prompt((5, 6, 7)), Prompt((5, 6, 7)), Prompt((9, 8))]
REPLIES = [(10, 11, 12, 13), (14, 15), (16, 17, 18)]


@pytest.fixture(params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    made = tiny_models.backbone(request.param, 384)
    add_random_role(made, EVALUATOR, head=True)
    return made


def _tokens_of_last_mlp(backbone: Backbone, depth: int | None = None) -> list[int]:
    """Return a list that receives the number of tokens of each call of the last MLP."""
    seen: list[int] = []
    module = last_mlp(backbone.loaded.model, depth)
    assert module is not None
    first = next(child for child in module.children() if any(True for _ in child.parameters()))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    return seen


@torch.no_grad()
def test_scores_are_those_of_the_whole_pass(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pad_sequences(backbone, PROMPTS, REPLIES)
    with backbone.acting_as(EVALUATOR):
        found = final_scores(backbone, EVALUATOR, batch)
        seen = _tokens_of_last_mlp(backbone)
        final_scores(backbone, EVALUATOR, batch)
        monkeypatch.setattr(backbone, "_picks_tokens", False)
        expected = final_scores(backbone, EVALUATOR, batch)
    assert seen[0] == len(REPLIES)
    assert seen[1] > 2 * len(REPLIES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 1e-3, "the scores differ, so they are compared"


@torch.no_grad()
def test_states_in_separate_rows_too(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_shares_prefixes", False)
    batch = pad_sequences(backbone, PROMPTS, REPLIES)
    rows, tokens = torch.tensor([0, 2, 1]), torch.tensor([3, 0, 1])
    with backbone.acting_as(BASE):
        found = states_at(backbone, batch, rows, tokens)
        whole_BTD = backbone.hidden(batch.ids_BT, batch.attention_BT)
    expected = torch.stack([whole_BTD[0, 3 + 3], whole_BTD[2, 2], whole_BTD[1, 3 + 1]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert backbone.picks_tokens


WHOLE = {
    *("bloom", "falcon_h1", "falcon_mamba", "gpt_oss", "granitemoe"),
    *("llama4", "mamba", "mamba2", "opt", "opt_projected"),
}
"""Families whose last layer has no module `mlp` that treats tokens independently and returns a tensor."""
FAST = ("gemma3", "glm4", "mamba", "qwen3_moe")


@pytest.mark.parametrize("family", [name if name in FAST else slow(name) for name in sorted(FAMILIES)])
def test_every_family_has_the_states_of_its_whole_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_models.backbone(family)
    batch, rows, tokens = pad_sequences(backbone, PROMPTS, REPLIES), torch.arange(3), torch.tensor([3, 1, 2])
    assert backbone.picks_tokens == (family not in WHOLE)
    with torch.no_grad(), backbone.acting_as(BASE):
        found = states_at(backbone, batch, rows, tokens)
        monkeypatch.setattr(backbone, "_picks_tokens", False)
        torch.testing.assert_close(found, states_at(backbone, batch, rows, tokens), rtol=1e-5, atol=1e-5)


def test_with_gradients_everything_is_computed(backbone: Backbone) -> None:
    batch = pad_sequences(backbone, PROMPTS, REPLIES)
    with backbone.acting_as(EVALUATOR):
        seen = _tokens_of_last_mlp(backbone)
        assert final_scores(backbone, EVALUATOR, batch).shape == (3,)
    assert seen[0] > len(REPLIES)


def test_a_role_of_an_earlier_layer_ends_at_its_own_mlp() -> None:
    backbone = tiny_models.backbone("llama", 384)
    backbone.roles.add("shallow", layer=1, trainable=False)
    batch = pad_sequences(backbone, PROMPTS, REPLIES)
    seen = _tokens_of_last_mlp(backbone, 1)
    rows, tokens = torch.arange(3), torch.tensor([3, 1, 2])
    with torch.no_grad(), backbone.acting_as("shallow"):
        found = states_at(backbone, batch, rows, tokens)
        assert seen[-1] == 3
        whole_BTD = backbone.hidden(batch.ids_BT, batch.attention_BT)
    expected = torch.stack([whole_BTD[0, 6], whole_BTD[1, 4], whole_BTD[2, 4]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_mlp_that_mixes_tokens_is_noticed() -> None:
    """As one that normalises over the batch would."""
    backbone = tiny_models.backbone("llama", 384)
    module = last_mlp(backbone.loaded.model)
    assert isinstance(module, nn.Module)
    assert agrees_at_picked_tokens(backbone)
    plain = module.forward
    module.forward = lambda states: plain(states - states.mean(dim=(0, 1)))
    assert not agrees_at_picked_tokens(backbone)
