from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from selfeval.backbone.body import text_body
from selfeval.backbone.depth import first_layers, shortened_config
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.errors import ConfigError, ModelError, RoleError, RunFolderError
from selfeval.store import read_json, write_json

IDS = torch.tensor([[5, 9, 3, 7, 20, 11]])
FINAL_NORMS = {"llama": "norm", "gpt2": "ln_f", "glm4": "norm"}


def with_roles(family: str = "llama") -> Backbone:
    """A backbone of two layers with an evaluator of each."""
    made = tiny_models.backbone(family, 384)
    for role, layer in (("early", 1), ("late", None)):
        made.roles.add(role, seed=1, head=True, layer=layer)
        tiny_models.scramble(made, role, seed=3, size=0.1)
    return made


@torch.no_grad()
def hidden(backbone: Backbone, role: str) -> Tensor:
    with backbone.acting_as(role):
        return backbone.hidden(IDS, torch.ones_like(IDS))


@pytest.mark.parametrize("family", FINAL_NORMS)
def test_an_early_role_reads_the_first_layer_through_the_final_norm(family: str) -> None:
    backbone = with_roles(family)
    body: Any = text_body(backbone.model)
    with torch.no_grad(), backbone.acting_as("early"):
        # All layers under the role, which has adapters on the first one only; its output is the second of the hidden states.
        with backbone._stack.block(backbone._stack.acting):  # type: ignore[arg-type]
            states = body(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
        expected = getattr(body, FINAL_NORMS[family])(states[1])
    torch.testing.assert_close(hidden(backbone, "early"), expected, rtol=0, atol=1e-5)
    assert (hidden(backbone, "early") - hidden(backbone, "late")).abs().max() > 1e-2


def test_later_layers_have_no_adapters_and_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_roles()
    first, second = text_body(backbone.model).layers  # type: ignore[misc]
    assert {name.split(".")[2] for name in backbone.roles.adapter("early")} <= {"0", "layers"}
    assert 2 * len(backbone.roles.adapter("early")) == len(backbone.roles.adapter("late"))
    called: list[str] = []
    for name, layer in (("first", first), ("second", second)):
        layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    hidden(backbone, "early")
    assert called == ["first"]
    hidden(backbone, "late")
    assert called == ["first", "first", "second"]


def test_a_copy_reads_the_same_layer_and_the_last_layer_is_no_earlier_one() -> None:
    backbone = with_roles()
    backbone.roles.add("copy", copy_of="early", head=True)
    backbone.roles.add("whole", layer=2)
    torch.testing.assert_close(hidden(backbone, "copy"), hidden(backbone, "early"), rtol=0, atol=0)
    assert backbone.roles.depths == {"early": 1, "copy": 1}
    backbone.roles.remove("early")
    assert "early" not in backbone.roles.depths


def test_roles_of_different_layers_do_not_share_a_pass() -> None:
    backbone = with_roles()
    with backbone.acting_as(["early", "late"]), pytest.raises(RoleError, match="different layers"):
        backbone.hidden(IDS.repeat(2, 1), torch.ones(2, 6, dtype=torch.int64))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_the_model_does_not_have_is_refused(layer: int) -> None:
    backbone = tiny_models.backbone("llama")
    with pytest.raises(ConfigError, match=f"layer = {layer}, but this model has layers 1 to 2"):
        backbone.roles.add("early", layer=layer)
    assert backbone.roles.names == ()


class _OwnLoop(nn.Module):
    """A decoder that holds its layers a second time, and computes these."""

    def __init__(self, index: bool) -> None:
        super().__init__()
        self.layers, self.embedding = nn.ModuleList([nn.Identity(), nn.Identity()]), nn.Embedding(3, 2)
        self.again = list(self.layers)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = (self.layers[i] if self.index else self.again[i])(x)
        return x


@pytest.mark.parametrize("index", [False, True], ids=["another list", "fixed indices"])
def test_a_family_that_does_not_compute_its_list_of_layers_is_refused(index: bool) -> None:
    model: Any = tiny_models.model("llama")
    model.model = body = _OwnLoop(index)
    with pytest.raises(ModelError, match="models of type llama do not compute their layers"), first_layers(model, 1):
        body(torch.ones(2))
    torch.testing.assert_close(body(torch.ones(2)), torch.ones(2))


def test_lists_with_an_entry_per_layer_are_shortened() -> None:
    config = tiny_models.tiny_config("qwen3", 40, num_hidden_layers=3)
    short = shortened_config(config, 2)
    assert (short.num_hidden_layers, len(short.layer_types)) == (2, 2)
    assert (config.num_hidden_layers, len(config.layer_types)) == (3, 3)


def test_a_saved_role_remembers_its_layer(tmp_path: Path) -> None:
    saved = with_roles()
    for role in ("early", "late"):
        save_role(saved, role, tmp_path / role)
    assert "layer" not in read_json(tmp_path / "late" / "role.json")
    loaded = tiny_models.backbone("llama", 384)
    for role in ("early", "late"):
        load_role(loaded, role, tmp_path / role)
        torch.testing.assert_close(hidden(loaded, role), hidden(saved, role), rtol=0, atol=0)
    assert loaded.roles.depths == {"early": 1}


@pytest.mark.parametrize("layer", [0, 2, True, "1", 1.0])
def test_a_saved_role_with_a_damaged_layer_is_refused(layer: object, tmp_path: Path) -> None:
    save_role(with_roles(), "early", tmp_path)
    write_json(tmp_path / "role.json", {**read_json(tmp_path / "role.json"), "layer": layer})
    with pytest.raises(RunFolderError, match=r"layer is .* instead of a whole number from 1 to 1"):
        load_role(tiny_models.backbone("llama", 384), "early", tmp_path)


@pytest.mark.parametrize("index", [False, True], ids=["another list", "fixed indices"])
def test_a_layer_is_checked_with_a_pass(index: bool) -> None:
    backbone = tiny_models.backbone("llama")
    backbone.check_layer(1)
    assert backbone.roles.names == ()
    body: Any = text_body(backbone.model)
    again = list(body.layers)

    def forward(input_ids: Tensor, **_: Any) -> Any:
        states = body.embed_tokens(input_ids)
        turns = body.rotary_emb(states, torch.arange(input_ids.shape[1])[None])
        for i in range(2):
            states = (body.layers[i] if index else again[i])(states, position_embeddings=turns)
        return SimpleNamespace(last_hidden_state=states)

    body.forward = forward
    with pytest.raises(ModelError, match="do not compute their layers one after the other"):
        backbone.check_layer(1)
    assert backbone.roles.names == ()


def test_targets_of_later_layers_only_are_named() -> None:
    backbone = tiny_models.backbone("llama", targets=("layers.1.mlp.up_proj", "layers.0.mlp.down_proj"))
    backbone.check_layer(1)
    backbone = tiny_models.backbone("llama", targets=("layers.1.mlp.up_proj",))
    with pytest.raises(ModelError, match=r"in its first 1 layers \(evaluator\.inputs\)"):
        backbone.check_layer(1)


def test_an_index_error_of_a_pass_is_not_one_of_the_family() -> None:
    backbone = with_roles()
    with pytest.raises(IndexError, match="in self"), backbone.acting_as("early"):
        backbone.hidden(torch.tensor([[5, 999_999]]), torch.ones(1, 2, dtype=torch.int64))


def test_token_ids_are_no_list_of_layers() -> None:
    config = tiny_models.tiny_config("llama", 40, num_hidden_layers=3, eos_token_id=[1, 2, 3])
    assert shortened_config(config, 1).eos_token_id == [1, 2, 3]
