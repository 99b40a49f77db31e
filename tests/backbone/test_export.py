from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig

import tiny_models
from selfeval.backbone import export
from selfeval.backbone.export import write_adapter, write_merged
from selfeval.backbone.load import load_model
from selfeval.backbone.merging import padding_tokenizer
from selfeval.backbone.role_files import load_role, save_role
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.config import LoraConfig
from selfeval.errors import ExportError, RunFolderError
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from token_prompts import as_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft and transformers

PROMPTS, REPLIES = [(5, 9), (4,), (6, 7, 8)], [(2, 17, 30, 1), (8, 1), (9, 3, 12, 21, 2, 1)]
VOCABULARY = 384


def model_folder(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    made = tiny_models.model(family, VOCABULARY, seed=seed, **changes)
    return tiny_models.save_model(made, tiny_models.words_tokenizer(), folder)


def backbone_at(folder: Path) -> Backbone:
    return Backbone(load_model(str(folder)), LoraConfig(rank=4, alpha=8.0), folder.name)


def trained(folder: Path) -> Backbone:
    backbone = backbone_at(folder)
    backbone.roles.add("policy", seed=1)
    backbone.roles.add("evaluator-0", seed=2, head=True)
    tiny_models.scramble(backbone, "policy")
    tiny_models.scramble(backbone, "evaluator-0", seed=8)
    return backbone


@torch.no_grad()
def scores(backbone: Backbone, role: str = "evaluator-0") -> Tensor:
    with backbone.acting_as(role):
        return final_scores(backbone, role, pad_sequences(backbone, as_prompts(PROMPTS), REPLIES))


@torch.no_grad()
def logits(backbone: Backbone, role: str, ids: Tensor) -> Tensor:
    with backbone.acting_as(role):
        return backbone.model(input_ids=ids).logits


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- merged -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_transformers_generates_from_a_merged_policy_what_our_engine_generates(family: str, tmp_path: Path) -> None:
    backbone = trained(model_folder(tmp_path / "model", family))
    layout, agreement = write_merged(backbone, "policy", tmp_path / "out", backbone.loaded.tokenizer)
    assert (layout, agreement.compared, agreement.precision) == ("language model", "logits", "float32")
    assert agreement.difference <= 1e-4 < agreement.largest
    with backbone.acting_as("policy"):
        ours = [
            r.ids for r in generate(backbone, [Request(Prompt(p), temperature=0.0) for p in PROMPTS], max_new_tokens=12, seed=0)
        ]
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs.append(tuple(alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, len(prompt):].tolist()))  # fmt: skip  # noqa: E501
    assert theirs == ours
    assert len(set(ours)) > 1


def test_a_generation_config_travels_as_it_is(tmp_path: Path) -> None:
    """Also one that transformers would load and refuse to save: publishers leave such values in it."""
    folder = model_folder(tmp_path / "model")
    values = {"eos_token_id": [1, 3], "pad_token_id": 0, "do_sample": False, "temperature": 0.7, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(values))
    backbone = trained(folder)
    write_merged(backbone, "policy", tmp_path / "out", backbone.loaded.tokenizer)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: found[name] for name in values} == values


def test_large_weights_come_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_SHARD", "40KB")
    backbone = trained(model_folder(tmp_path / "model"))
    _, agreement = write_merged(backbone, "policy", tmp_path / "out", backbone.loaded.tokenizer)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert agreement.difference <= 1e-4


@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"), [(torch.bfloat16, "bfloat16", 0.1), (torch.float32, "float32", 1e-4)]
)
def test_precision_of_merged_weights_is_a_choice(dtype: torch.dtype, precision: str, allowed: float, tmp_path: Path) -> None:
    backbone = trained(model_folder(tmp_path / "model"))
    layout, agreement = write_merged(backbone, "evaluator-0", tmp_path / "out", padding_tokenizer(backbone.loaded), dtype)
    assert (layout, agreement.compared, agreement.precision) == ("classifier", "scores", precision)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert 0 < agreement.difference <= allowed * max(1, agreement.largest)


@pytest.mark.parametrize("role", ["policy", "evaluator-0"])
def test_a_merge_that_forgot_the_adapter_is_not_exported(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained(model_folder(tmp_path / "model"))
    for module in backbone.model.modules():
        if hasattr(module, "get_delta_weight"):
            monkeypatch.setattr(module, "get_delta_weight", lambda _, shape=module.weight.shape: torch.zeros(shape))
    with pytest.raises(ExportError, match=r"does not reproduce the role: \w+ differ by up to .*Nothing was exported"):
        write_merged(backbone, role, tmp_path / "out", padding_tokenizer(backbone.loaded))


def test_a_head_that_was_set_anew_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = trained(model_folder(tmp_path / "model"))
    made = export.merged_classifier

    def with_another_head(*arguments: Any) -> Any:
        merged = made(*arguments)
        nn.init.normal_(merged.score.weight)
        return merged

    monkeypatch.setattr(export, "merged_classifier", with_another_head)
    with pytest.raises(ExportError, match="scores differ by up to"):
        write_merged(backbone, "evaluator-0", tmp_path / "out", padding_tokenizer(backbone.loaded))


def test_the_end_token_as_padding_is_not_exported(tmp_path: Path) -> None:
    backbone = trained(model_folder(tmp_path / "model"))
    tokenizer = tiny_models.words_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ExportError, match="scores differ by up to"):
        write_merged(backbone, "evaluator-0", tmp_path / "out", tokenizer)


# -- adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_peft_loads_a_policy_from_the_folder_alone(family: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model", family)
    backbone = trained(base)
    assert write_adapter(backbone, "policy", tmp_path / "out", str(base)) == "adapter"
    ids = torch.tensor([[5, 9, 2, 17, 30]])
    expected = logits(backbone, "policy", ids)
    assert (expected - logits(backbone, "base", ids)).abs().max() > 0.1
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    by_itself = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    for theirs in (by_hand.eval(), by_itself.eval()):
        close(theirs(input_ids=ids).logits.detach(), expected, 1e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_peft_loads_an_evaluator_with_its_head_from_the_folder_alone(family: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model", family)
    backbone = trained(base)
    assert write_adapter(backbone, "evaluator-0", tmp_path / "out", str(base)) == "classifier adapter"
    expected = scores(backbone)
    assert expected.abs().min() > 1e-2
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1).eval()
    theirs.config.pad_token_id = tiny_models.PAD
    batch = pad_sequences(backbone, as_prompts(PROMPTS), REPLIES)
    found = theirs(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits.detach()[:, 0]
    close(found + backbone.roles.heads["evaluator-0"].bias.detach(), expected, 1e-5)


@pytest.mark.parametrize("role", ["policy", "evaluator-0"])
def test_an_exported_adapter_is_a_role_again(role: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    backbone = trained(base)
    write_adapter(backbone, role, tmp_path / "out", str(base))
    fresh = backbone_at(base)
    load_role(fresh, "again", tmp_path / "out")
    ids = torch.tensor([[5, 9, 2, 17, 30]])
    close(logits(fresh, "again", ids), logits(backbone, role, ids), 1e-5)
    assert ("again" in fresh.roles.heads) == (role == "evaluator-0")
    if role == "evaluator-0":
        close(scores(fresh, "again"), scores(backbone), 1e-5)


def test_an_exported_adapter_on_another_base_is_refused_naming_both(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "first")
    write_adapter(trained(base), "evaluator-0", tmp_path / "out", str(base))
    other = backbone_at(model_folder(tmp_path / "second", seed=5))
    with pytest.raises(RunFolderError, match=r"was trained on first \(weights \w+\), not on second \(weights \w+\)"):
        load_role(other, "evaluator-0", tmp_path / "out")


def test_an_exported_adapter_with_another_scale_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    write_adapter(trained(base), "evaluator-0", tmp_path / "out", str(base))
    other = Backbone(load_model(str(base)), LoraConfig(rank=4, alpha=16.0), "model")
    with pytest.raises(RunFolderError, match=r"trained with backbone\.lora .*'alpha': 8.0.*not with .*'alpha': 16.0"):
        load_role(other, "evaluator-0", tmp_path / "out")


def test_a_family_without_a_classifier_keeps_adapter_and_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CohereConfig(
        vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.25, **sizes
    )
    made = AutoModelForCausalLM.from_config(config)
    base = tiny_models.save_model(made, tiny_models.words_tokenizer(), tmp_path / "model")
    backbone = trained(base)
    assert write_adapter(backbone, "evaluator-0", tmp_path / "out", str(base)) == "adapter and head"
    fresh = backbone_at(base)
    load_role(fresh, "evaluator-0", tmp_path / "out")
    close(scores(fresh), scores(backbone), 1e-5)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    ids = torch.tensor([[5, 9, 2, 17, 30]])
    close(peft(input_ids=ids).logits.detach(), logits(backbone, "evaluator-0", ids), 1e-5)


@pytest.mark.parametrize("damage", ["loses a tensor", "changes a tensor", "loses the head"])
def test_files_that_do_not_hold_the_role_are_not_exported(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = model_folder(tmp_path / "model")
    backbone = trained(base)

    def save_badly(backbone: Backbone, role: str, folder: Path) -> None:
        save_role(backbone, role, folder)
        path = folder / ("head.safetensors" if damage == "loses the head" else "adapter_model.safetensors")
        tensors = load_file(path)
        name = sorted(tensors)[0]
        tensors = {**tensors, name: tensors[name] + 1} if damage == "changes a tensor" else {**tensors}
        if damage != "changes a tensor":
            del tensors[name]
        save_file(tensors, path)

    monkeypatch.setattr("selfeval.backbone.export.save_role", save_badly)
    with pytest.raises(ExportError, match="do not contain the weights of evaluator-0"):
        write_adapter(backbone, "evaluator-0", tmp_path / "out", str(base))
