"""Adapters that no pass reads are refused if named, and left out of all-linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, MllamaConfig, MllamaForConditionalGeneration

import tiny_models
from selfeval.backbone.check import check_model
from selfeval.backbone.families import adapters
from selfeval.backbone.load import load_model
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.config import LoraConfig
from selfeval.errors import ConfigError, ModelError
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from token_prompts import as_prompts

NAMED = [("mamba", "dt_proj"), ("falcon_mamba", "dt_proj"), ("mamba", "x_proj")]


@pytest.mark.parametrize(("family", "layer"), NAMED)
def test_layers_that_no_pass_reads_are_refused_by_name(family: str, layer: str) -> None:
    backbone = tiny_models.backbone(family, targets=("in_proj", layer))
    if layer == "x_proj":  # is called
        backbone.roles.add("policy")
        return
    with pytest.raises(ModelError, match=rf"lora\.targets names mixer\.{layer}, but no pass of models of type {family}"):
        backbone.roles.add("policy")
    assert backbone.roles.names == ()
    assert not any("lora_" in name for name, _ in backbone.model.named_parameters())


def test_all_linear_leaves_them_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the table of families does not name them."""
    monkeypatch.setattr(adapters, "_UNREACHED", {"mamba": ("out_proj",)})
    backbone = tiny_models.backbone("mamba")
    backbone.roles.add("policy", seed=3)
    backbone.roles.add("other", seed=3)
    assert [note for note in backbone.loaded.notes if "mixer.dt_proj" in note] == backbone.loaded.notes[-1:]
    for role in ("policy", "other"):
        assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in backbone.roles.parameters(role)} == {"in_proj", "x_proj"}
    monkeypatch.undo()
    plain = tiny_models.backbone("mamba")
    plain.roles.add("policy", seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(*(b.roles.parameters("policy").values() for b in (backbone, plain)), strict=True)
    )


def test_experts_that_no_token_came_to_are_not_unread() -> None:
    backbone = tiny_models.backbone("mixtral_experts", targets="all-linear")
    backbone.roles.add("policy")
    assert backbone.roles._unread == ()


def test_the_check_leaves_nothing_behind() -> None:
    backbone = tiny_models.backbone("llama")
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    backbone.roles.check_targets()
    assert backbone.roles.names == ()
    after = dict(backbone.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) and not after[name].requires_grad for name, p in before.items())
    backbone.roles.add("policy", trainable=False)
    assert all(p.grad is None and not p.requires_grad for p in backbone.roles.parameters("policy").values())


@pytest.mark.parametrize("targets", [("no_such_layer",), ("lm_head",)])
def test_targets_are_checked_before_a_role_needs_them(targets: tuple[str, ...]) -> None:
    with pytest.raises((ModelError, ConfigError), match=r"lora\.targets"):
        tiny_models.backbone("llama", targets=targets).roles.check_targets()


# -- families that differ from config to module -----------------------------------------------------------------------------


def scores(family: str, folder: Path, **sizes: Any) -> torch.Tensor:
    made = tiny_models.model(family, 384, **sizes)
    tiny_models.save_model(made, tiny_models.words_tokenizer(), folder)
    loaded = load_model(str(folder), device="cpu", precision="fp32")
    backbone = Backbone(loaded, LoraConfig(rank=2), "model")
    backbone.roles.add("evaluator-0", head=True)
    tiny_models.scramble(backbone, "evaluator-0")
    with torch.no_grad(), backbone.acting_as("evaluator-0"):
        return final_scores(
            backbone, "evaluator-0", pad_sequences(backbone, as_prompts([(5, 6, 7), (9,)]), [(8, 9, 1), (4, 1)])
        )


def test_hidden_states_may_be_narrower_than_the_model(tmp_path: Path) -> None:
    """OPT-350m projects them before the output layer."""
    made = scores("opt_projected", tmp_path / "narrow")
    assert made.shape == (2,)
    assert made.std() > 0
    assert load_model(str(tmp_path / "narrow"), device="cpu").hidden_size == 16


_TEXT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.25,
}  # fmt: skip
_SIGHT = {"hidden_size": 16, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8, "vision_output_dim": 32}


def with_pictures(kind: str) -> Any:
    """A vision-language model as published on the hub: its config and its weights hold both parts."""
    if kind == "llama4":
        text = {**_TEXT, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
        sight = {"num_attention_heads": 2, "intermediate_size": 64, "projector_input_dim": 16, "projector_output_dim": 16}
        config = Llama4Config(text_config=text, vision_config={**_SIGHT, **sight, "vision_output_dim": 16})
        return Llama4ForConditionalGeneration(config)
    text = {
        **_TEXT,
        "bos_token_id": 2,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    sight = {"attention_heads": 2, "intermediate_size": 16, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    tiles = {"max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config={**_SIGHT, **sight, **tiles}))


@pytest.mark.parametrize("kind", ["llama4", "mllama"])
def test_models_that_read_pictures_are_used_as_language_models(kind: str, tmp_path: Path) -> None:
    folder = tiny_models.save_model(with_pictures(kind), tiny_models.words_tokenizer(), tmp_path / "model")
    check_model(str(folder))
    loaded = load_model(str(folder), device="cpu", precision="fp32")
    assert any("vision_model" in note and "ignored" in note for note in loaded.notes)
    backbone = Backbone(loaded, LoraConfig(rank=2), "model")
    backbone.roles.add("policy")
    layers = {name.split(".lora_")[0].rsplit(".", 2)[1] for name in backbone.roles.parameters("policy")}
    assert "self_attn" in layers
    assert "cross_attn" not in layers  # used for images only
    with backbone.acting_as("policy"):
        assert len(generate(backbone, [Request(Prompt((5, 6, 7))), Request(Prompt((9,)))], max_new_tokens=3, seed=0)) == 2


def test_a_body_that_the_familys_prefix_does_not_name(tmp_path: Path) -> None:
    assert scores("llama4", tmp_path / "model").std() > 0
