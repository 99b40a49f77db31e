"""The pass over one token: bit for bit the model's own, and never used where the model computes something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models
from selfeval.backbone import decode_step
from selfeval.backbone.adapters import BASE
from selfeval.backbone.decode_step import DecodeStep
from selfeval.backbone.families.cache import preallocated_cache, state_arguments
from selfeval.backbone.roles import Backbone
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout

EQUAL: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}


def with_roles(family: str, **changes: Any) -> Backbone:
    backbone = tiny_models.backbone(family, **changes)
    for seed, role in enumerate(("policy", "other")):
        backbone.roles.add(role)
        tiny_models.scramble(backbone, role, seed=seed, size=0.1)
    return backbone


def sampled(backbone: Backbone, role: str, lengths: tuple[int, ...] = (3, 7, 5, 5)) -> list[Rollout]:
    prompts = [Prompt(tuple(2 + (7 * i + n) % 37 for n in range(length))) for i, length in enumerate(lengths)]
    with backbone.acting_as(role):
        return generate(backbone, [Request(prompt) for prompt in prompts], max_new_tokens=12, seed=3)


def by_the_model(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[Rollout]:
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "decode_step", lambda self: None)
        return sampled(backbone, *arguments)


def assert_equal(found: list[Rollout], expected: list[Rollout], dtype: torch.dtype) -> None:
    """Attention over grouped queries may sum in another order, which moves the last bits of a log-prob."""
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert [r.ids for r in found] == [r.ids for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EQUAL)
def test_replies_and_logprobs_are_those_of_the_models_own_pass(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = with_roles(family, dtype=dtype, **EQUAL[family])
    assert backbone.decode_step() is not None
    for role in (BASE, "policy"):
        # The last two without padding: attention has no mask.
        for lengths in ((), ((5, 5),), ((1,),)):
            assert_equal(sampled(backbone, role, *lengths), by_the_model(backbone, monkeypatch, role, *lengths), dtype)


def test_rows_of_several_roles_share_a_step() -> None:
    backbone = with_roles("llama")
    ids, attention = torch.tensor([[4, 5, 6]] * 3), torch.ones(3, 4, dtype=torch.long)

    def after(roles: str | list[str], rows: int) -> Tensor:
        step = backbone.decode_step()
        assert step is not None
        with torch.no_grad(), backbone.acting_as(roles):
            kept = preallocated_cache(backbone.model.config, 1)
            backbone.model(ids[:rows], use_cache=True, **state_arguments(backbone.loaded, kept, attention[:rows, :3], 3))
            return step.logits(ids[:rows, :1], attention[:rows], kept)

    mixed = after(["policy", "other", "policy"], 3)
    torch.testing.assert_close(mixed[:1], after("policy", 1))
    torch.testing.assert_close(mixed[1:2], after("other", 1))
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-2)
    torch.testing.assert_close(mixed[0], mixed[2])


@pytest.mark.parametrize("family", ["gpt2", "glm4", "gemma2", "mixtral", "mamba"])
def test_other_families_keep_their_own_pass(family: str) -> None:
    assert tiny_models.backbone(family).decode_step() is None


def test_a_sliding_window_keeps_the_models_own_pass() -> None:
    assert tiny_models.backbone("mistral", sliding_window=4).decode_step() is None


def test_what_is_attached_to_a_module_keeps_the_models_own_pass() -> None:
    backbone = with_roles("llama")
    layer = backbone.model.model.layers[1]
    for attach in (
        layer.mlp.register_forward_hook,
        layer.self_attn.q_proj.register_forward_hook,  # in addition to the adapters'
        layer.register_forward_pre_hook,
        backbone.model.lm_head.register_forward_hook,
    ):
        handle = attach(lambda *_: None)
        assert backbone.decode_step() is None, attach
        handle.remove()
    assert backbone.decode_step() is not None
    layer.mlp.down_proj = Halved(8, 8)
    assert backbone.decode_step() is None


class Halved(torch.nn.Linear):
    """Stands for a quantised layer: a linear layer with other arithmetic."""


@pytest.mark.parametrize("padded", [False, True], ids=["without padding", "with padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_keeps_its_own_pass(
    padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release of transformers that changes the layer is noticed by the numbers, whichever kernel it changes."""
    own = DecodeStep.logits

    def changed(self: DecodeStep, ids: Tensor, attention: Tensor, cache: Any) -> Tensor:
        logits = own(self, ids, attention, cache)
        return logits * 0.9 if padded != bool(attention.all()) else logits

    monkeypatch.setattr(DecodeStep, "logits", changed)
    assert with_roles("llama", dtype=dtype).decode_step() is None


DEEP = {"num_hidden_layers": 60, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_deep_model_has_the_step_although_rounding_adds_up() -> None:
    """The pass with padding differs by 1e-5 from the model's own, which is more than a few units in the last place."""
    assert tiny_models.backbone("llama", **DEEP).decode_step() is not None


def test_a_small_fault_in_a_deep_model_is_more_than_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    own = decode_step._attend

    def changed(*arguments: Any, **options: Any) -> Tensor:
        return own(*arguments, **options) * 1.001

    monkeypatch.setattr(decode_step, "_attend", changed)
    assert tiny_models.backbone("llama", **DEEP).decode_step() is None


def test_a_model_with_other_names_keeps_its_own_pass() -> None:
    backbone = with_roles("llama")
    attention = backbone.model.model.layers[0].self_attn
    attention.scale = attention.__dict__.pop("scaling")
    assert backbone.decode_step() is None


class Packed(torch.nn.Module):
    """Stands for a quantised layer that is no subclass of a linear one."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def test_a_layer_that_is_no_linear_one_keeps_the_models_own_pass() -> None:
    expected = sampled(tiny_models.backbone("llama"), BASE)
    backbone = tiny_models.backbone("llama")
    mlp = backbone.model.model.layers[1].mlp
    mlp.down_proj = Packed(mlp.down_proj)
    assert backbone.decode_step() is None
    assert_equal(sampled(backbone, BASE), expected, torch.float32)
