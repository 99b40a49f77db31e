"""Replies that share the pass of their prompt have the outputs and gradients of separate rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny_models
from selfeval.backbone import shared_prefixes
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences, reply_hidden, reply_logprobs, states_at
from selfeval.config import LoraConfig, Pooling
from selfeval.planner.shape_tracing import ShapeBackbone
from selfeval.prompt import Prompt
from tiny_families import FAMILIES, WINDOW

# Within the sliding windows of the families.
PROMPTS = [Prompt((5, 9, 30)), Prompt((8, 3))]
ASKED = [PROMPTS[i] for i in (0, 1, 0, 0, 1)]
REPLIES = [[4, 6, 11], [30, 31, 7, 2, 9], [8], [21, 4, 4, 19], [12, 5]]
LONGEST = 7
SEPARATE_ROWS = frozenset({"bloom", "falcon", "falcon_40b", "falcon_h1", "falcon_rw", "llama4", "mamba"})
"""Families without position ids, with a recurrent state, with their own attention code, or with a scale by row position."""


def with_roles(
    family: str = "llama", *, layer: int | None = None, pooling: Pooling = "last", dtype: torch.dtype = torch.float32
) -> Backbone:
    backbone = tiny_models.backbone(family, dtype=dtype)
    backbone.roles.add("policy", head=True, layer=layer, pooling=pooling)
    tiny_models.scramble(backbone, "policy", size=0.05)
    return backbone


def outputs(backbone: Backbone) -> list[Tensor]:
    """Return states, scores, and the gradient of both in the adapter and the head."""
    batch = pad_sequences(backbone, ASKED, REPLIES)
    with backbone.acting_as("policy"):
        states = reply_hidden(backbone, batch)[batch.mask_BR]
        scores = final_scores(backbone, "policy", batch)
        rows, tokens = torch.tensor([0, 1, 1, 3, 4]), torch.tensor([1, 0, 4, 3, 1])
        scores = scores + backbone.score("policy", states_at(backbone, batch, rows, tokens))
        weights = torch.linspace(-1, 1, states.numel()).view_as(states)
        loss = (states * weights).sum() + (scores * torch.arange(1.0, 6.0)).sum()
        gradients = torch.autograd.grad(loss, list(backbone.roles.parameters("policy").values()), allow_unused=True)
    return [states, scores, *(g for g in gradients if g is not None)]


def both_ways(backbone: Backbone) -> tuple[list[Tensor], list[Tensor]]:
    assert backbone.shares_prefixes(LONGEST)
    shared = outputs(backbone)
    backbone._shares_prefixes = False
    return shared, outputs(backbone)


def assert_equal(backbone: Backbone) -> None:
    for found, expected in zip(*both_ways(backbone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


def count_tokens(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each pass adds its tokens, padding included."""
    tokens: list[int] = []
    body = backbone._body

    def counting(**arguments: Tensor) -> Tensor:
        tokens.append(arguments["input_ids"].numel())
        return body(**arguments)

    monkeypatch.setattr(backbone, "_body", counting)
    return tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_and_gradients_are_those_of_separate_rows(family: str) -> None:
    backbone = with_roles(family)
    if backbone.model.config._attn_implementation != "sdpa" or family in SEPARATE_ROWS:
        assert not backbone.shares_prefixes(LONGEST)
    else:
        assert_equal(backbone)


def test_mean_pooling() -> None:
    assert_equal(with_roles(pooling="mean"))


def test_an_earlier_layer() -> None:
    assert_equal(with_roles(layer=1))


def test_layers_that_are_recomputed_read_the_same_layout() -> None:
    backbone = with_roles()
    expected = outputs(backbone)
    assert backbone.shares_prefixes(LONGEST)
    backbone.recompute_layers()
    for found, value in zip(outputs(backbone), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_each_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_roles()
    assert backbone.shares_prefixes(LONGEST)
    assert backbone.picks_tokens
    tokens = count_tokens(backbone, monkeypatch)
    batch = pad_sequences(backbone, ASKED, REPLIES)
    with torch.no_grad(), backbone.acting_as("policy"):
        reply_hidden(backbone, batch)
        final_scores(backbone, "policy", batch)
    # The last token of a reply predicts none.
    assert tokens == [5 + 15 - 5, 5 + 15]


def test_where_nothing_is_saved_rows_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_roles()
    assert backbone.shares_prefixes(LONGEST)
    assert backbone.picks_tokens
    tokens = count_tokens(backbone, monkeypatch)
    batch = pad_sequences(backbone, PROMPTS, [[4, 6, 11], [4, 6, 11, 12]])
    with torch.no_grad(), backbone.acting_as("policy"):
        final_scores(backbone, "policy", batch)
    assert tokens == [12]


def test_replies_of_one_token_are_predicted_by_their_prompts() -> None:
    backbone = with_roles()
    batch = pad_sequences(backbone, ASKED, [[token] for token in (4, 30, 8, 21, 12)])
    with torch.no_grad(), backbone.acting_as("policy"):
        shared = reply_hidden(backbone, batch)
        backbone._shares_prefixes = False
        torch.testing.assert_close(shared, reply_hidden(backbone, batch), rtol=1e-5, atol=1e-5)


def test_the_logprobs_do_not_depend_on_the_size_of_the_groups() -> None:
    backbone = with_roles()
    with backbone.acting_as("policy"):
        whole, small = (reply_logprobs(backbone, ASKED, REPLIES, batch_tokens=tokens) for tokens in (1000, 16))
    for found, expected in zip(small, whole, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma3", "gemma3_vision"])
def test_texts_longer_than_the_sliding_window_are_separate_rows(family: str) -> None:
    backbone = with_roles(family)
    assert backbone.shares_prefixes(WINDOW)
    assert not backbone.shares_prefixes(WINDOW + 1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_backbone_of_shapes_shares_where_the_real_one_does(family: str) -> None:
    real = tiny_models.backbone(family)
    attention = real.model.config._attn_implementation
    shapes = ShapeBackbone(real.model.config, torch.float32, LoraConfig(rank=4), {"policy": False}, attention=attention)
    assert shapes.shares_prefixes(LONGEST) == real.shares_prefixes(LONGEST)


def test_an_error_in_a_pass_leaves_the_attention_as_it_was() -> None:
    backbone = with_roles()
    batch = pad_sequences(backbone, ASKED, REPLIES)
    assert backbone.shares_prefixes(LONGEST)
    handle = backbone.model.base_model.layers[-1].register_forward_hook(lambda *_: 1 / 0)
    with backbone.acting_as("policy"), pytest.raises(ZeroDivisionError):
        reply_hidden(backbone, batch)
    handle.remove()
    assert backbone.model.config._attn_implementation == "sdpa"
    assert shared_prefixes._blocks() == []


def test_rows_of_several_roles_are_read_separately() -> None:
    backbone = with_roles()
    with backbone.acting_as(["policy", "base"]):
        assert not backbone.shares_prefixes(LONGEST)


def test_it_is_measured_in_sixteen_bits_too() -> None:
    assert with_roles(dtype=torch.bfloat16).shares_prefixes(LONGEST)


def test_attention_that_ignores_the_layout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def causal(module: object, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: object) -> object:
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setattr("selfeval.backbone.shared_prefixes._attend", causal)
    assert not with_roles().shares_prefixes(LONGEST)


def test_other_passes_keep_their_attention() -> None:
    backbone = with_roles()
    with torch.no_grad(), backbone.acting_as("policy"):
        before = backbone.model(torch.tensor([[5, 9, 30]])).logits
        outputs_of_layout = reply_hidden(backbone, pad_sequences(backbone, ASKED, REPLIES))
        assert backbone.model.config._attn_implementation == "sdpa"
        assert torch.equal(before, backbone.model(torch.tensor([[5, 9, 30]])).logits)
    assert outputs_of_layout.shape[:2] == (5, 5)
