"""Roles whose rank or pooling is not that of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_models
from selfeval.backbone.merging import merged_classifier
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.errors import ExportError, RunFolderError
from selfeval.prompt import Prompt
from selfeval.store import read_json, write_json

ROLES = {"plain": {}, "low": {"rank": 2}, "mean": {"pooling": "mean"}, "both": {"rank": 2, "pooling": "mean"}}
PROMPTS, REPLIES = [Prompt((5, 9)), Prompt((8,)), Prompt((7, 6, 5))], [(20, 21, 22, 1), (23, 1), (24,)]


def with_roles() -> Backbone:
    """A backbone of rank 4 with an evaluator of each kind."""
    made = tiny_models.backbone("llama", 384, rank=4)
    for role, settings in ROLES.items():
        made.roles.add(role, seed=1, head=True, **settings)
        tiny_models.scramble(made, role, seed=3, size=0.1)
    return made


@torch.no_grad()
def scores(backbone: Backbone, role: str) -> Tensor:
    with backbone.acting_as(role):
        return final_scores(backbone, role, pad_sequences(backbone, PROMPTS, REPLIES))


def ranks(backbone: Backbone, role: str) -> set[int]:
    return {p.shape[0] for name, p in backbone.roles.adapter(role).items() if ".lora_A." in name}


def test_a_pooled_score_is_the_head_on_the_mean_state_of_the_reply() -> None:
    backbone = with_roles()
    found = scores(backbone, "mean").tolist()
    for prompt, reply, score in zip(PROMPTS, REPLIES, found, strict=True):
        ids = torch.tensor([[*prompt.ids, *reply]])
        with torch.no_grad(), backbone.acting_as("mean"):  # one row alone, without padding
            hidden_TD = backbone.hidden(ids, torch.ones_like(ids))[0]
            expected = backbone.score("mean", hidden_TD[len(prompt.ids) :].mean(0)).item()
        assert score == pytest.approx(expected, abs=1e-5)
    assert (scores(backbone, "plain")[:2] - scores(backbone, "mean")[:2]).abs().min() > 1e-3


def test_a_role_has_a_rank_and_the_scale_of_its_rank() -> None:
    backbone = with_roles()
    assert [ranks(backbone, role) for role in ROLES] == [{4}, {2}, {4}, {2}]
    layer = next(module for name, module in backbone.model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    alpha = backbone.roles.lora.alpha
    assert [layer.scaling[role] for role in ("plain", "low")] == [alpha / 4, alpha / 2]


def test_a_copy_has_the_rank_but_pools_nothing() -> None:
    backbone = with_roles()
    # As a critic starts from an evaluator: it has a value at every token.
    backbone.roles.add("critic", copy_of="both", head=True)
    assert ranks(backbone, "critic") == {2}
    assert backbone.roles.poolings == {"mean": "mean", "both": "mean"}
    for ours, theirs in zip(backbone.roles.adapter("critic").values(), backbone.roles.adapter("both").values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    backbone.roles.remove("both")
    assert (backbone.roles.ranks, backbone.roles.poolings) == ({"low": 2, "critic": 2}, {"mean": "mean"})


def test_the_first_role_of_a_backbone_may_have_both() -> None:
    backbone = tiny_models.backbone("llama", rank=4)
    backbone.roles.add("first", head=True, rank=2, pooling="mean")
    assert (ranks(backbone, "first"), backbone.roles.poolings) == ({2}, {"first": "mean"})


def test_a_saved_role_remembers_its_rank_and_its_pooling(tmp_path: Path) -> None:
    saved = with_roles()
    for role in ROLES:
        save_role(saved, role, tmp_path / role)
    recorded = {role: read_json(tmp_path / role / "role.json") for role in ROLES}
    assert {role: {k: v for k, v in one.items() if k in ("rank", "pooling")} for role, one in recorded.items()} == ROLES
    loaded = tiny_models.backbone("llama", 384, rank=4)
    for role in ROLES:
        load_role(loaded, role, tmp_path / role)
        torch.testing.assert_close(scores(loaded, role), scores(saved, role), rtol=0, atol=0)
    assert (loaded.roles.ranks, loaded.roles.poolings) == (saved.roles.ranks, saved.roles.poolings)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"rank": 0}, "rank is 0 instead of a whole number of at least 1"),
        ({"rank": True}, "rank is True instead of"),
        ({"rank": 3}, r"trained with backbone.lora .*'rank': 2.*, not with .*'rank': 3"),
        ({"pooling": "max"}, """pooling is 'max' instead of "last" or "mean\""""),
    ],
)
def test_a_damaged_record_is_refused(damage: dict[str, object], said: str, tmp_path: Path) -> None:
    save_role(with_roles(), "both", tmp_path)
    write_json(tmp_path / "role.json", {**read_json(tmp_path / "role.json"), **damage})
    backbone = tiny_models.backbone("llama", 384, rank=4)
    with pytest.raises(RunFolderError, match=said):
        load_role(backbone, "both", tmp_path)
    assert backbone.roles.names == ()


def test_a_pooled_role_is_no_classifier() -> None:
    with pytest.raises(ExportError, match=r"pooling = \"mean\" in evaluator.inputs.* without --merge"):
        merged_classifier(with_roles(), "mean", pad_id=0)
