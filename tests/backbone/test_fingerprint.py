"""One changed number of a base, or one changed byte of what loading reads, is detected; their location is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from selfeval.backbone.digests import tensor_digests
from selfeval.backbone.fingerprint import base_fingerprint, model_identity
from selfeval.backbone.load import LoadedModel, load_model
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.config import LoraConfig, PlacementConfig
from selfeval.errors import ModelError, RunFolderError

WIDE = {"hidden_size": 64, "intermediate_size": 200}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tiny_models.model("llama", 384, **WIDE)
    return tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "model")


def load(folder: Path, precision: str = "fp32", **options: PlacementConfig) -> LoadedModel:
    return load_model(str(folder), device="cpu", precision=precision, **options)


def change(folder: Path, weight: str, index: int) -> None:
    """Flip the sign of one number of a weight; the file keeps its size and its time."""
    path = folder / "model.safetensors"
    weights, status = load_file(path), path.stat()
    weights[weight].view(-1)[index] *= -1
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("weight", "index"),
    [("model.layers.0.mlp.down_proj.weight", 6001), ("model.embed_tokens.weight", 1), ("model.norm.weight", 5)],
)
def test_one_changed_number_is_another_base(folder: Path, tmp_path: Path, weight: str, index: int) -> None:
    identity, backbone = model_identity(str(folder)), Backbone(load(folder), LoraConfig(), "base")
    backbone.roles.add("policy")
    save_role(backbone, "policy", tmp_path / "role")
    change(folder, weight, index)
    assert model_identity(str(folder)) != identity
    assert base_fingerprint(load(folder)) != backbone.fingerprint
    with pytest.raises(RunFolderError, match="load it on its own base"):
        load_role(Backbone(load(folder), LoraConfig(), "base"), "policy", tmp_path / "role")


def test_every_precision_and_placement_of_a_base_is_the_same_base(folder: Path) -> None:
    on_disk = PlacementConfig(max_memory={"cpu": 500_000})
    found = [load(folder), load(folder, "bf16"), load(folder, placement=on_disk)]
    assert found[2].placement is not None
    assert "disk" in found[2].placement.devices
    assert len({base_fingerprint(loaded) for loaded in found}) == 1


def test_the_same_weights_in_other_files_are_the_same_base(folder: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(folder, tmp_path / "shards"))
    (shards / "model.safetensors").unlink()
    tiny_models.model("llama", 384, **WIDE).save_pretrained(shards, max_shard_size="200KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    assert base_fingerprint(load(shards)) == base_fingerprint(load(folder))
    assert model_identity(str(shards)) == model_identity(str(folder))


def test_weights_in_memory_are_hashed_too() -> None:
    one, other = (tiny_models.backbone("llama") for _ in range(2))
    assert one.fingerprint == other.fingerprint
    with torch.no_grad():
        other.model.lm_head.weight[17, 3] += 1e-3
    assert base_fingerprint(other.loaded) != one.fingerprint


READ = [
    "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "merges.txt", "vocab.txt", "vocab.json",
    "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "tokenizer.model", "modeling_own.py",
]  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_file_that_loading_reads_counts(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(path.read_text() if path.is_file() else "one")
    before = model_identity(str(folder))
    assert model_identity(str(folder)) == before
    path.write_text(path.read_text() + " ")
    assert model_identity(str(folder)) != before


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "notes.md"])
def test_a_file_that_loading_does_not_read_does_not_count(folder: Path, name: str) -> None:
    before = model_identity(str(folder))
    (folder / name).write_text("text")
    assert model_identity(str(folder)) == before


def test_a_folder_that_cannot_be_loaded_has_an_identity(folder: Path) -> None:
    before = model_identity(str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert model_identity(str(folder)) != before
    with pytest.raises(ModelError, match="org/name is neither a local folder nor in the Hub cache"):
        model_identity("org/name")


# -- numbers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight in the weight files contain NaN or infinite"):
        load(folder)


def test_large_numbers_are_finite(folder: Path) -> None:
    """Their sum is not."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert all(digest.is_finite for digest in tensor_digests([folder / "model.safetensors"]))


def test_a_digest_is_that_of_the_bytes(folder: Path) -> None:
    import hashlib

    weights = load_file(folder / "model.safetensors")
    found = {digest.name: digest for digest in tensor_digests([folder / "model.safetensors"])}
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].hash == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert (found[name].shape, found[name].dtype, found[name].is_finite) == (tuple(tensor.shape), "F32", True)
