from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny_models
from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.merging import merged_language_model
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.errors import RoleError, RunFolderError

FIRST, COUNT, VOCABULARY = 30, 6, 40
IDS = torch.tensor([[5, 30, 31, 8, 35, 12], [33, 7, 39, 30, 2, 1]])
FAMILIES = [("llama", True), ("llama", False), ("gemma3", True), ("gemma2", True), ("cohere", True)]
"""With a scaled embedding (Gemma), a soft cap (Gemma 2) and scaled logits (Cohere)."""


def with_rows(family: str = "llama", tied: bool = True, *, size: float = 0.3) -> Backbone:
    made = tiny_models.backbone(family, VOCABULARY, tie_word_embeddings=tied)
    made.roles.add("tuned")
    made.roles.add_rows("tuned", FIRST, COUNT)
    tiny_models.scramble(made, "tuned", size=size)
    return made


def logits(backbone: Backbone, role: str = "tuned") -> Tensor:
    with backbone.acting_as(role):
        return backbone.logits(backbone.hidden(IDS, torch.ones_like(IDS)))


def merged_model(backbone: Backbone, folder: Path) -> Any:
    """The merged model, read from a file, because a merge does not fill buffers that are not saved."""
    merged_language_model(backbone, "tuned").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def loss(backbone: Backbone, **options: Any) -> Tensor:
    with backbone.acting_as("tuned"):
        hidden = backbone.hidden(IDS, torch.ones_like(IDS))
        mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
        return token_logprobs(backbone, hidden[:, :-1], IDS[:, 1:], mask, **options).logprobs.sum()


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_merged_model_computes_what_the_role_computes(tmp_path: Path, family: str, tied: bool) -> None:
    backbone = with_rows(family, tied)
    merged = merged_model(backbone, tmp_path)
    with torch.no_grad():
        expected, found = logits(backbone), merged(input_ids=IDS).logits.float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(backbone, "base")).abs().max() > 0.1
    is_tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert is_tied == tied


@pytest.mark.parametrize(("family", "tied", "temperature"), [(*each, 0.7 if each[0] == "gemma2" else 1.0) for each in FAMILIES])
def test_gradients_equal_those_of_the_merged_weights(tmp_path: Path, family: str, tied: bool, temperature: float) -> None:
    """The reference: plain autograd through log-softmax of a model whose embedding and output layer are trained."""
    backbone = with_rows(family, tied)
    loss(backbone, temperature=temperature, chunk_bytes=4096).backward()
    merged = merged_model(backbone, tmp_path)
    weights = [merged.get_input_embeddings().weight, *([] if tied else [merged.get_output_embeddings().weight])]
    for weight in weights:
        weight.requires_grad_(True)
    logprobs = torch.log_softmax(merged(input_ids=IDS).logits.float() / temperature, -1)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    logprobs[:, :-1].gather(2, IDS[:, 1:, None])[..., 0][mask].sum().backward()
    rows = backbone.roles.rows["tuned"]
    for weight, trained in zip(weights, [rows.input, *([] if rows.output is None else [rows.output])], strict=True):
        assert trained.grad is not None
        expected = weight.grad[FIRST : FIRST + COUNT]
        # Both differ from gradients in 64 bits by 1e-5 of the largest element, and so by much more of one that nearly cancels.
        torch.testing.assert_close(trained.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        assert expected.abs().max() > 1e-3


def test_only_the_acting_role_sees_its_rows() -> None:
    backbone = with_rows()
    plain = tiny_models.backbone("llama", VOCABULARY, tie_word_embeddings=True)
    plain.roles.add("other")
    backbone.roles.add("other")
    with torch.no_grad():
        assert torch.equal(logits(backbone, "other"), logits(plain, "other"))
    with pytest.raises(RoleError, match="cannot share a forward pass"), backbone.acting_as(["tuned", "other"]):
        backbone.hidden(IDS, torch.ones_like(IDS))


def test_new_rows_begin_at_the_base_and_a_snapshot_of_trained_ones_is_refused() -> None:
    backbone = tiny_models.backbone("llama", VOCABULARY)
    backbone.roles.add("tuned")
    backbone.roles.add_rows("tuned", FIRST, COUNT)
    assert backbone.roles.is_bare("tuned")
    with torch.no_grad():
        assert torch.equal(logits(backbone), logits(backbone, "base"))
        backbone.roles.rows["tuned"].input[0, 0] = 1.0
    assert not backbone.roles.is_bare("tuned")
    with pytest.raises(RoleError, match='cannot copy "tuned", which trains rows of new tokens'):
        backbone.roles.add_snapshot("reference", "tuned")
    backbone.roles.remove("tuned")
    with torch.no_grad():
        logits(backbone, "base")
    assert not backbone.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("tied", [True, False])
def test_rows_survive_a_file(tmp_path: Path, tied: bool) -> None:
    backbone = with_rows(tied=tied)
    save_role(backbone, "tuned", tmp_path / "role")
    again = tiny_models.backbone("llama", VOCABULARY, tie_word_embeddings=tied)
    load_role(again, "tuned", tmp_path / "role")
    with torch.no_grad():
        assert torch.equal(logits(again), logits(backbone))
    assert not any(p.requires_grad for p in again.roles.parameters("tuned").values())


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    save_role(with_rows(), "tuned", tmp_path / "role")
    path = tmp_path / "role" / "rows.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    backbone = tiny_models.backbone("llama", VOCABULARY, tie_word_embeddings=True)
    with pytest.raises(RunFolderError, match=r"rows.safetensors is damaged"):
        load_role(backbone, "tuned", tmp_path / "role")


def test_rows_beyond_the_model_are_refused() -> None:
    backbone = tiny_models.backbone("llama", VOCABULARY)
    backbone.roles.add("tuned")
    with pytest.raises(ValueError, match="tokens 38 to 43 are not among the 40 rows"):
        backbone.roles.add_rows("tuned", 38, 6)


def test_an_entropy_has_no_gradient_for_the_rows() -> None:
    with pytest.raises(ValueError, match="gradients of log-probs only"):
        loss(with_rows(), entropy=True, gradient=("logprobs", "entropy"))
