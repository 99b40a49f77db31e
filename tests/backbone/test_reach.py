"""Adapters that no pass reads are refused where they were named, and left out of all-linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.families import adapters
from selfeval.backbone.load import load_model
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.config import LoraConfig
from selfeval.errors import ConfigError, ModelError

NAMED = [("mamba", "dt_proj"), ("falcon_mamba", "dt_proj"), ("mamba", "x_proj")]


@pytest.mark.parametrize(("family", "layer"), NAMED)
def test_layers_that_no_pass_reads_are_refused_by_name(family: str, layer: str) -> None:
    backbone = tiny_models.backbone(family, targets=("in_proj", layer))
    if layer == "x_proj":  # is called
        backbone.add_role("policy")
        return
    with pytest.raises(ModelError, match=rf"lora\.targets names mixer\.{layer}, but no pass of models of type {family}"):
        backbone.add_role("policy")
    assert backbone.roles == ()
    assert not any("lora_" in name for name, _ in backbone.model.named_parameters())


def test_all_linear_leaves_them_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the table of families does not name them."""
    monkeypatch.setattr(adapters, "_UNREACHED", {"mamba": ("out_proj",)})
    backbone = tiny_models.backbone("mamba")
    backbone.add_role("policy", seed=3)
    backbone.add_role("other", seed=3)
    assert [note for note in backbone.loaded.notes if "mixer.dt_proj" in note] == backbone.loaded.notes[-1:]
    for role in ("policy", "other"):
        assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in backbone.parameters(role)} == {"in_proj", "x_proj"}
    monkeypatch.undo()
    plain = tiny_models.backbone("mamba")
    plain.add_role("policy", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(*(b.parameters("policy").values() for b in (backbone, plain)), strict=True))


def test_experts_that_no_token_came_to_are_not_unread() -> None:
    backbone = tiny_models.backbone("mixtral_experts", targets="all-linear")
    backbone.add_role("policy")
    assert backbone._unread == ()


def test_the_check_leaves_nothing_behind() -> None:
    backbone = tiny_models.backbone("llama")
    before = {name: p.detach().clone() for name, p in backbone.model.named_parameters()}
    backbone.check_targets()
    assert backbone.roles == ()
    after = dict(backbone.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) and not after[name].requires_grad for name, p in before.items())
    backbone.add_role("policy", trainable=False)
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters("policy").values())


@pytest.mark.parametrize("targets", [("no_such_layer",), ("lm_head",)])
def test_targets_are_checked_before_a_role_needs_them(targets: tuple[str, ...]) -> None:
    with pytest.raises((ModelError, ConfigError), match=r"lora\.targets"):
        tiny_models.backbone("llama", targets=targets).check_targets()


# -- families that differ from config to module -----------------------------------------------------------------------------


def scores(family: str, folder: Path, **sizes: Any) -> torch.Tensor:
    made = tiny_models.model(family, 384, **sizes)
    tiny_models.save_model(made, tiny_models.words_tokenizer(), folder)
    loaded = load_model(str(folder), device="cpu", precision="fp32")
    backbone = Backbone(loaded, LoraConfig(rank=2), "model")
    backbone.add_role("evaluator-0", head=True)
    tiny_models.scramble(backbone, "evaluator-0")
    with torch.no_grad(), backbone.acting_as("evaluator-0"):
        return final_scores(backbone, "evaluator-0", pad_sequences(backbone, [(5, 6, 7), (9,)], [(8, 9, 1), (4, 1)]))


def test_hidden_states_may_be_narrower_than_the_model(tmp_path: Path) -> None:
    """OPT-350m projects them before the output layer."""
    made = scores("opt_projected", tmp_path / "narrow")
    assert made.shape == (2,)
    assert made.std() > 0
    assert load_model(str(tmp_path / "narrow"), device="cpu").hidden_size == 16


def test_a_body_that_the_familys_prefix_does_not_name(tmp_path: Path) -> None:
    assert scores("llama4", tmp_path / "model").std() > 0
