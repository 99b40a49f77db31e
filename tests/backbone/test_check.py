"""A model that cannot be used is refused before any weight is read, by `check_model` and by `load_model` alike."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import tiny_models
from selfeval.backbone.check import check_model, read_parts
from selfeval.backbone.load import load_model
from selfeval.backbone.weight_headers import read_headers
from selfeval.config import ContextConfig
from selfeval.errors import ModelError
from tiny_families import FAMILIES

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '4'}\nsize 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")


def refused(name: Path, *words: str) -> str:
    """Return the message, which must be the same from both functions."""
    said = set()
    for door in (lambda: check_model(str(name)), lambda: load_model(str(name), device="cpu")):
        with pytest.raises(ModelError) as caught:
            door()
        said.add(str(caught.value))
    assert len(said) == 1
    message = said.pop()
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -- what is given instead of a model folder ------------------------------------------------------------------------------


def test_a_good_folder_passes_and_no_weight_is_read(folder: Path) -> None:
    check_model(str(folder))
    weights = folder / "model.safetensors"
    length = struct.unpack("<Q", weights.read_bytes()[:8])[0]
    with weights.open("r+b") as file:  # the numbers are not looked at
        file.seek(8 + length)
        file.write(b"\xff" * (weights.stat().st_size - 8 - length))
    check_model(str(folder))
    parts = read_parts(str(folder))
    assert {p.device.type for p in parts.shell.parameters()} == {"meta"}
    assert parts.files == (weights,)
    assert parts.notes == []


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.nested and row.model_type != "chatglm"])
def test_every_family_fits_its_own_files(family: str, tmp_path: Path) -> None:
    """Their files hold other names and shapes than the model in memory: experts apart, matrices split or joined."""
    tokenizer = tiny_models.words_tokenizer(vocabulary=280)
    folder = tiny_models.save_model(tiny_models.model(family, 280), tokenizer, tmp_path / "model")
    check_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    name = max(weights, key=lambda n: weights[n].numel() * ("experts" not in n))
    save_file({n: t for n, t in weights.items() if n != name}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"\d weights? (is|are) missing from its files"):
        check_model(str(folder))


def test_a_file_is_no_folder(folder: Path) -> None:
    refused(folder / "model.safetensors", "is a file, not a folder", "config.json")
    gguf = folder / "model.gguf"
    gguf.write_bytes(b"GGUF")
    refused(gguf, "GGUF", "safetensors")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    LoraConfig(base_model_name_or_path="org/base", target_modules=["q_proj"]).save_pretrained(str(tmp_path / "adapter"))
    refused(tmp_path / "adapter", "PEFT adapter for org/base", "merge")


def test_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    refused(tmp_path, "is a run folder", "selfeval export")


def test_a_folder_of_gguf_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    refused(tmp_path, "q4.gguf", "GGUF")
    (folder / "model.safetensors").unlink()
    (folder / "q4.gguf").write_bytes(b"GGUF")
    refused(folder, "q4.gguf", "GGUF")


@pytest.mark.parametrize("text", ["[]", "3", '"llama"'])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json contains a", "instead of an object")


# -- weight files ---------------------------------------------------------------------------------------------------------


def test_pickled_weights_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = refused(folder, "pytorch_model.bin", "safetensors", "convert it")
    command = message.split("convert it: ")[1].split(", copy")[0]
    exec(command.replace("NEW_FOLDER", str(folder / "new")))  # the remedy works
    for path in folder.glob("tokenizer*"):
        shutil.copy(path, folder / "new")
    check_model(str(folder / "new"))


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, "weights.safetensors", "model.safetensors")
    (folder / "weights.safetensors").unlink()
    refused(folder, "no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    refused(folder, name, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_a_file_that_is_cut_off(folder: Path, keep: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(folder, str(weights), "truncated", "again")


def test_a_file_with_more_behind_it(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    refused(folder, str(weights), "4 of its", "belong to no tensor")


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON at all",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    refused(folder, "header is damaged")


def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    tiny_models.model("llama", 384).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_a_shard_that_is_missing(folder: Path) -> None:
    check_model(str(sharded(folder)))
    shard = min(folder.glob("model-*.safetensors"))
    shard.unlink()
    refused(folder, shard.name, "1 of the")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index(folder: Path, text: str) -> None:
    (sharded(folder) / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json", "download it again")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/hostname"])
def test_an_index_that_lists_a_file_outside_of_the_folder(folder: Path, name: str) -> None:
    """transformers would join the name to the folder and load the weights there."""
    shutil.copytree(folder, folder.parent / "other")
    index = sharded(folder) / "model.safetensors.index.json"
    edit(index, weight_map=dict.fromkeys(json.loads(index.read_text())["weight_map"], name))
    refused(folder, "model.safetensors.index.json", f"lists '{name}', which is not a file in the model folder")


def test_an_adapter_config_does_not_lead_to_another_base(folder: Path) -> None:
    """transformers would load the weights of the folder that it names, and the adapter of this one."""
    shutil.copytree(folder, folder.parent / "other")
    values = {
        "base_model_name_or_path": str(folder.parent / "other"),
        "peft_type": "LORA",
        "r": 2,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    refused(folder, "both a config.json and an adapter_config.json for", "remove adapter_config.json")


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:function"},
        {"experts_implementation": "/tmp/kernel"},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"attn_implementation": {"text_config": "evil/kernel"}},
    ],
)
def test_a_config_that_names_a_kernel_on_the_hub(folder: Path, values: dict[str, Any]) -> None:
    """transformers would download and execute it, if the package kernels is installed."""
    edit(folder / "config.json", **values)
    refused(folder, "_implementation = ", "never executed; remove that line")


def test_headers_say_where_a_tensor_is(folder: Path) -> None:
    headers = read_headers((folder / "model.safetensors",))
    data = (folder / "model.safetensors").read_bytes()
    for name, tensor in load_file(folder / "model.safetensors").items():
        header = headers[name]
        assert header.shape == tuple(tensor.shape)
        assert torch.frombuffer(bytearray(data[header.start : header.stop]), dtype=torch.float32).equal(tensor.reshape(-1))


# -- config.json and weights that do not belong together -------------------------------------------------------------------


def test_weights_of_another_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    refused(folder, "model.layers.0.mlp.down_proj.weight has shape [32, 48]", "[32, 64] in config.json", "5 more")


def test_fewer_layers_than_the_files_hold(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)
    refused(folder, "more layers than config.json describes", "model.layers.1.")


def test_more_layers_than_the_files_hold(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3)
    refused(folder, "9 weights are missing", "model.layers.2.")


def test_layers_that_predict_ahead_are_no_mistake(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1, num_nextn_predict_layers=1)
    assert any("ignored" in note and "model.layers.1." in note for note in load_model(str(folder), device="cpu").notes)


def test_weights_without_a_place_are_said(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "vision.tower.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(str(folder), device="cpu")
    assert any("vision.tower.weight" in note and "ignored" in note for note in loaded.notes)


def test_experts_of_different_shapes(tmp_path: Path) -> None:
    made = tiny_models.model("mixtral", 384)
    folder = tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "experts.1." in n)
    save_file({**weights, name: weights[name][:-1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "config.json", "same model")


# -- tokenizer, context ---------------------------------------------------------------------------------------------------


def _remove(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _damage(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("harm", [_remove, _damage])
def test_a_tokenizer_that_cannot_be_read(folder: Path, harm: Callable[[Path], None]) -> None:
    harm(folder)
    refused(folder, "tokenizer", "published")


def test_a_context_that_the_model_cannot_be_given(tmp_path: Path) -> None:
    folder = tiny_models.save_model(tiny_models.model("gpt2", 384), tiny_models.words_tokenizer(), tmp_path / "model")
    with pytest.raises(ModelError, match="RoPE"):
        check_model(str(folder), context=ContextConfig(rope_scaling="yarn", rope_factor=2.0))


def test_the_whole_reason_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of torch and of the hub client often state their cause after the first line."""

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("Error(s) in loading:\n\tthe cause\n" + "x" * 1000)

    monkeypatch.setattr("selfeval.backbone.check.AutoConfig.from_pretrained", fail)
    message = refused(folder, "Error(s) in loading: the cause")
    assert message.endswith("...")
    assert len(message) < 600


# -- files that would fill the memory -------------------------------------------------------------------------------------


def enlarge(path: Path, size: int) -> None:
    """Give a file a size without writing it, as an archive or a download could."""
    with path.open("ab") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("name", "size"), [("tokenizer.json", 1 << 40), ("config.json", 1 << 40), ("chat_template.jinja", 2 << 20)]
)
def test_a_text_file_of_enormous_size_is_not_read(folder: Path, name: str, size: int) -> None:
    enlarge(folder / name, size)
    refused(folder, f"{folder / name} has ", "the limit", "published with")


@pytest.mark.parametrize(("name", "size"), [("tokenizer.json", 1 << 40), ("config.json", 1 << 40)])
def test_the_limits_hold_for_the_snapshot_of_a_hub_id(
    folder: Path, name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    enlarge(snapshot / name, size)
    with pytest.raises(ModelError, match=f"{name} has .*the limit.*published with"):
        check_model("org/name")


def test_a_named_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    refused(folder, f"{folder / 'tokenizer.json'} is not a file")


def test_an_enormous_chat_template_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}" * 100_000)
    refused(folder, "chat template", "1,400,000 characters", "the limit")


def test_a_header_of_enormous_size_is_not_read(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 1 << 40))
    enlarge(weights, 1 << 41)
    refused(folder, "not a safetensors file", "its header has")


@pytest.mark.parametrize("values", [{"num_hidden_layers": 5_000}, {"text_config": {"n_layer": 10**12}}, {"num_experts": 10**9}])
def test_a_config_of_a_few_bytes_cannot_build_billions_of_layers(folder: Path, values: dict[str, Any]) -> None:
    edit(folder / "config.json", **values)
    refused(folder, f"config.json of {folder} sets", "at most 4,096")
