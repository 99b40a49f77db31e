from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import tiny_models
from selfeval.backbone.load import load_model, pick_device
from selfeval.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save_model(tiny_models.model("llama", 384), tiny_models.words_tokenizer(), tmp_path / "model")


def load(folder: Path) -> Any:
    return load_model(str(folder), device="cpu")


def test_a_model_folder_loads_frozen_and_equal(folder: Path) -> None:
    loaded = load(folder)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.model(input_ids=ids).logits, tiny_models.model("llama", 384)(input_ids=ids).logits)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training
    assert (loaded.eos_ids, loaded.pad_id, loaded.precision, loaded.device.type) == ((1,), 0, "fp32", "cpu")
    assert (loaded.hidden_size, loaded.context_length, loaded.notes) == (32, 512, [])
    assert loaded.forward_accepts("position_ids")
    assert not loaded.forward_accepts("no_such_argument")


# -- what cannot be used ------------------------------------------------------------------------------------------------


def refused(name: str, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_no_model_at_all() -> None:
    refused("", "--model")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    refused(name, name, "does not exist", "hub id")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(str(folder), "no config.json")


@pytest.mark.parametrize("text", ["{", "", "\x00\x01"])
def test_a_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(str(folder), "config.json is not valid JSON")


@pytest.mark.parametrize("value", [{}, {"model_type": "no-such-family"}, []])
def test_a_config_of_no_known_family(folder: Path, value: Any) -> None:
    (folder / "config.json").write_text(json.dumps(value))
    refused(str(folder), str(folder))


def _bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 384}
    return BertForSequenceClassification(BertConfig(**sizes))


def _t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _bart() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"vocab_size": 384, "d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes, **widths))


def _vit() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16))


@pytest.mark.parametrize("make", [_bert, _t5, _bart, _vit])
def test_a_model_that_is_not_causal(tmp_path: Path, make: Any) -> None:
    made = make()
    tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "other")
    refused(str(tmp_path / "other"), type(made).__name__, "not a causal language model")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(str(folder), "truncated", str(folder))


def test_weights_that_are_missing_a_tensor(folder: Path) -> None:
    # transformers fills the gap with random numbers; a run on those would be worthless.
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(str(folder), "model.layers.1.mlp.up_proj.weight")


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused(str(folder), "has shape [32, 48]")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(str(folder), "no weights")


def test_no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(str(folder), "cannot load model")


# -- tokenizers ---------------------------------------------------------------------------------------------------------


def _without(folder: Path, special: dict[str, int | None], tokens: dict[str, str]) -> Path:
    """The folder with a tokenizer that knows only these special tokens, and a config with these ids."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tiny_models.words_tokenizer().backend_tokenizer, **tokens).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **special}))
    return folder


def test_a_tokenizer_without_padding_fills_with_eos_and_says_so(folder: Path) -> None:
    loaded = load(_without(folder, {"pad_token_id": None}, {"eos_token": "<eos>"}))
    assert (loaded.pad_id, loaded.eos_ids) == (1, (1,))
    assert len(loaded.notes) == 1
    assert "padding token; token 1" in loaded.notes[0]


def test_a_model_without_an_end_says_so(folder: Path) -> None:
    loaded = load(_without(folder, {"pad_token_id": None, "eos_token_id": None}, {}))
    assert (loaded.pad_id, loaded.eos_ids) == (0, ())
    assert "no end-of-sequence token" in loaded.notes[0]
    assert "no padding token" in loaded.notes[1]


def test_several_ends_are_all_kept(folder: Path) -> None:
    loaded = load(_without(folder, {"eos_token_id": [7, 1, 9]}, {"eos_token": "<eos>", "pad_token": "<pad>"}))  # type: ignore[dict-item]
    assert loaded.eos_ids == (1, 7, 9)


def test_a_padding_token_outside_of_the_embedding_is_not_used(tmp_path: Path) -> None:
    # Common in fine-tuned checkpoints: "<pad>" was added to the tokenizer, but the embedding was never enlarged.
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    folder = tiny_models.save_model(tiny_models.model("llama", 380), tokenizer, tmp_path / "model")
    assert tokenizer.pad_token_id == 380
    loaded = load(folder)
    assert loaded.pad_id == 1
    assert "padding token" in loaded.notes[0]


# -- where and how precise ----------------------------------------------------------------------------------------------


def test_devices_and_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="device = auto or cpu"):
        pick_device("cuda")


def test_precision_is_that_of_the_weights(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", precision="bf16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
