from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    CohereConfig,
    MistralConfig,
)

import tiny_models
from selfeval.backbone.load import LoadedModel, load_model
from selfeval.backbone.merging import _update, is_quantised, merged_classifier, merged_language_model, padding_tokenizer
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import final_scores, pad_sequences
from selfeval.config import LoraConfig
from selfeval.errors import ExportError, RoleError
from token_prompts import as_prompts

FAMILIES = (*tiny_models.FAMILIES, "mistral")
VOCABULARY = 40
IDS = torch.tensor([[5, 9, 2, 17, 30, 11, 3]])
PROMPTS, REPLIES = [(5, 9), (4,), (6, 7, 8)], [(2, 17, 30, 1), (8, 1), (9, 3, 12, 21, 2, 1)]
NEW_PAD = VOCABULARY
"""An id that the tiny models have no row for."""


def from_config(config: Any, **lora: Any) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    loaded = LoadedModel(made, tiny_models.words_tokenizer(), torch.device("cpu"), "fp32", (1,), 0)
    return with_roles(Backbone(loaded, LoraConfig(rank=4, alpha=8.0, **lora), f"tiny-{config.model_type}"))


def with_roles(backbone: Backbone) -> Backbone:
    """A policy and an evaluator that look trained."""
    backbone.roles.add("policy", seed=1)
    backbone.roles.add("evaluator-0", seed=2, head=True)
    tiny_models.scramble(backbone, "policy")
    tiny_models.scramble(backbone, "evaluator-0", seed=8)
    return backbone


def backbone_of(family: str, **changes: Any) -> Backbone:
    if family == "mistral":
        sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return from_config(MistralConfig(vocab_size=VOCABULARY, hidden_size=32, initializer_range=0.25, **sizes, **changes))
    return with_roles(tiny_models.backbone(family, VOCABULARY, **changes))


@torch.no_grad()
def logits(backbone: Backbone, role: str) -> Tensor:
    with backbone.acting_as(role):
        return backbone.model(input_ids=IDS).logits


@torch.no_grad()
def scores(backbone: Backbone) -> Tensor:
    with backbone.acting_as("evaluator-0"):
        return final_scores(backbone, "evaluator-0", pad_sequences(backbone, as_prompts(PROMPTS), REPLIES))


@torch.no_grad()
def classifier_scores(folder: Path, side: str = "right") -> Tensor:
    """Score as a user of plain transformers would: the Auto class, a padded batch, and the constant from the config."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    pad = model.config.pad_token_id
    rows = [[*p, *r] for p, r in zip(PROMPTS, REPLIES, strict=True)]
    width = max(len(row) for row in rows)
    fills = [[pad] * (width - len(row)) for row in rows]
    ids = torch.tensor([row + fill if side == "right" else fill + row for row, fill in zip(rows, fills, strict=True)])
    return model(input_ids=ids, attention_mask=(ids != pad).long()).logits[:, 0] + model.config.score_bias


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- language models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_policy_says_what_the_role_says(family: str, tied: bool, tmp_path: Path) -> None:
    backbone = backbone_of(family, tie_word_embeddings=tied)
    expected = logits(backbone, "policy")
    assert (expected - logits(backbone, "base")).abs().max() > 0.1  # a forgotten adapter would show
    merged_language_model(backbone, "policy").save_pretrained(tmp_path)
    alone, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    close(alone(input_ids=IDS).logits.detach(), expected)
    is_tied = alone.get_output_embeddings().weight.data_ptr() == alone.get_input_embeddings().weight.data_ptr()
    assert is_tied == alone.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_merge_is_the_sum_in_fp32_rounded_once(rslora: bool) -> None:
    backbone = tiny_models.backbone("llama", VOCABULARY, dtype=torch.bfloat16)
    backbone.roles.lora = LoraConfig(rank=4, alpha=8.0, rslora=rslora)
    with_roles(backbone)
    own = {name: p.double() for name, p in backbone.roles.parameters("policy").items()}
    name = "model.layers.1.mlp.down_proj"
    base = backbone.model.get_submodule(name).base_layer.weight
    scale = 8.0 / 4**0.5 if rslora else 8.0 / 4
    update = scale * own[f"{name}.lora_B.policy.weight"] @ own[f"{name}.lora_A.policy.weight"]
    exact = base.double() + update
    close(merged_language_model(backbone, "policy", torch.float32).get_parameter(f"{name}.weight"), exact.float(), 1e-6)
    rounded = merged_language_model(backbone, "policy").get_parameter(f"{name}.weight")
    assert rounded.dtype == torch.bfloat16
    # One rounding of the exact sum; adding a rounded update to rounded weights would round twice.
    assert ((rounded.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")  # peft: merging would break the tie
def test_merging_leaves_the_live_base_alone_and_shares_nothing_with_it() -> None:
    backbone = backbone_of("llama", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    said = {role: logits(backbone, role) for role in ("base", "policy", "evaluator-0")}
    config = backbone.model.config.to_dict()
    for merged in (merged_language_model(backbone, "policy"), merged_classifier(backbone, "evaluator-0", NEW_PAD)):
        live = {t.untyped_storage().data_ptr() for t in backbone.model.state_dict().values()}
        assert not live & {p.untyped_storage().data_ptr() for p in merged.parameters()}
        for parameter in merged.parameters():
            parameter.data.zero_()
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(logits(backbone, role), expected) for role, expected in said.items())
    assert backbone.model.config.to_dict() == config


def test_merging_a_role_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(RoleError, match='no role "polcy" to merge; roles: policy, evaluator-0'):
        merged_language_model(backbone_of("llama"), "polcy")


# -- experts that are one parameter -------------------------------------------------------------------------------------

EXPERTS = {
    "mixtral": ("q_proj", "gate", "w1", "w2", "w3"),  # the router too, which is one matrix
    "qwen3_moe": ("q_proj", "gate_proj", "up_proj", "down_proj"),
    "deepseek_v3": ("q_a_proj", "gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match.*")
@pytest.mark.parametrize("family", EXPERTS)
def test_fused_experts_are_merged(family: str, tmp_path: Path) -> None:
    backbone = with_roles(tiny_models.backbone(family, VOCABULARY, targets=EXPERTS[family]))
    assert any(".experts." in name for name in backbone.roles.parameters("policy"))
    expected = logits(backbone, "policy")
    assert (expected - logits(backbone, "base")).abs().max() > 0.1
    merged_language_model(backbone, "policy").save_pretrained(tmp_path / "policy")
    alone, report = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    close(alone(input_ids=IDS).logits.detach(), expected)
    merged_classifier(backbone, "evaluator-0", NEW_PAD).save_pretrained(tmp_path / "evaluator")
    close(classifier_scores(tmp_path / "evaluator"), scores(backbone))


def test_the_sum_of_each_expert_is_taken_in_fp32_and_rounded_once() -> None:
    """Expert by expert, from PEFT's layout: A holds the ranks of one expert after those of another, B those of all experts."""
    backbone = with_roles(tiny_models.backbone("mixtral", VOCABULARY, targets=EXPERTS["mixtral"], dtype=torch.bfloat16))
    own = {name: p.detach().double() for name, p in backbone.roles.parameters("policy").items()}
    path, experts, scale = "model.layers.1.mlp.experts", 4, 8.0 / 4
    exact = {}
    # gate_up_proj is two matrices in one, for which PEFT doubles the rank; it is the inner of the two wrappers, or the outer.
    for leaf, rank, inputs in (("down_proj", 4, 48), ("gate_up_proj", 8, 32)):
        base = backbone.model.get_submodule(path).get_base_layer().get_parameter(leaf)
        inner = "" if own[f"{path}.lora_A.policy.weight"].shape[1] == inputs else "base_layer."
        down, up = (own[f"{path}.{inner}lora_{half}.policy.weight"] for half in "AB")
        updates = [scale * up[:, e::experts] @ down[e * rank : (e + 1) * rank] for e in range(experts)]
        exact[leaf] = base.double() + torch.stack(updates)
    merged, rounded = merged_language_model(backbone, "policy", torch.float32), merged_language_model(backbone, "policy")
    for leaf, expected in exact.items():
        close(merged.get_parameter(f"{path}.{leaf}"), expected.float(), 1e-6)
        found = rounded.get_parameter(f"{path}.{leaf}")
        assert found.dtype == torch.bfloat16
        assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()


def test_experts_that_are_held_transposed_are_updated_as_peft_computes_them() -> None:
    """As gpt-oss holds them, whose experts no value of backbone.lora.targets reaches today."""
    live: Any = tiny_models.model("gpt_oss", VOCABULARY)
    peft = PeftLoraConfig(r=4, lora_alpha=8.0, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    inject_adapter_in_model(peft, live, "policy")
    wrapper = live.model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(0)
    for weights in (wrapper.lora_A["policy"].weight, wrapper.lora_B["policy"].weight):
        weights.data = torch.randn(weights.shape, generator=generator)
    found = _update(wrapper, "down_proj", "policy")
    assert found is not None
    assert found.abs().max() > 1
    close(found, wrapper.get_delta_weight("policy").detach(), 1e-5)
    assert _update(wrapper, "gate_up_proj", "policy") is None
    assert _update(wrapper, "down_proj", "critic") is None


# -- classifiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_evaluator_scores_a_padded_batch_as_the_role_does(family: str, tmp_path: Path) -> None:
    backbone = backbone_of(family)
    expected = scores(backbone)
    assert expected.abs().min() > 1e-2
    assert backbone.roles.heads["evaluator-0"].bias.abs().item() > 1e-2  # a forgotten bias would show
    merged_classifier(backbone, "evaluator-0", NEW_PAD).save_pretrained(tmp_path)
    close(classifier_scores(tmp_path), expected)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert (config.num_labels, config.pad_token_id, config.vocab_size) == (1, NEW_PAD, NEW_PAD + 1)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])  # whose learned positions do not shift
def test_padding_on_the_left_gives_the_same_scores(family: str, tmp_path: Path) -> None:
    backbone = backbone_of(family)
    merged_classifier(backbone, "evaluator-0", NEW_PAD).save_pretrained(tmp_path)
    close(classifier_scores(tmp_path, "left"), scores(backbone))


def test_padding_with_the_end_token_reads_the_score_at_the_wrong_place(tmp_path: Path) -> None:
    """Reproduce the public bug, which shows that the padding token of the exported tokenizer matters."""
    backbone = backbone_of("gpt2")
    merged_classifier(backbone, "evaluator-0", pad_id=tiny_models.EOS).save_pretrained(tmp_path)
    assert (classifier_scores(tmp_path) - scores(backbone)).abs().min() > 1e-2


def test_a_padding_token_with_a_row_of_its_own_adds_none(tmp_path: Path) -> None:
    backbone = backbone_of("llama")
    merged_classifier(backbone, "evaluator-0", pad_id=0).save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.vocab_size == VOCABULARY
    close(classifier_scores(tmp_path), scores(backbone))


def test_a_role_without_a_head_is_no_classifier() -> None:
    with pytest.raises(RoleError, match='"policy" has no head'):
        merged_classifier(backbone_of("llama"), "policy", NEW_PAD)


def test_a_family_without_a_classifier_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = from_config(CohereConfig(vocab_size=VOCABULARY, eos_token_id=1, bos_token_id=2, initializer_range=0.25, **sizes))
    with pytest.raises(ExportError, match=r"no sequence classifier that fits models of type cohere.*without --merge"):
        merged_classifier(backbone, "evaluator-0", NEW_PAD)
    expected = logits(backbone, "policy")
    merged_language_model(backbone, "policy").save_pretrained(tmp_path)
    close(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=IDS).logits.detach(), expected)


# -- padding tokens -----------------------------------------------------------------------------------------------------


def padded(eos: tuple[int, ...] = (1,), **tokens: Any) -> Any:
    tokenizer = tiny_models.words_tokenizer(("<pad>", "<eos>", "<|held_pad|>", "<s>"))
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    loaded = LoadedModel(tiny_models.model("llama"), tokenizer, torch.device("cpu"), "fp32", eos, 0)
    found = padding_tokenizer(loaded)
    assert found is not tokenizer
    return found


def test_a_padding_token_of_its_own_is_kept() -> None:
    found = padded(pad_token="<pad>")
    assert (found.pad_token, found.padding_side) == ("<pad>", "right")
    assert set(found(["a b", "a"], padding=True)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("tokens", [{"pad_token": "<eos>"}, {"pad_token": None}, {"pad_token": "<s>", "bos_token": "<s>"}])
def test_a_padding_token_that_means_something_else_is_replaced(tokens: dict[str, Any]) -> None:
    found = padded(**tokens)
    assert "pad" in found.pad_token
    assert found.pad_token_id not in (found.eos_token_id, found.bos_token_id)


def test_a_padding_token_that_ends_replies_is_replaced_by_a_new_one() -> None:
    """Of Qwen and GLM: the padding token is one of several that end a reply."""
    found = padded(eos=(1, 0, 2), pad_token="<pad>")
    assert found.pad_token == "<|pad|>"
    assert found.pad_token_id == len(found) - 1 > 3


# -- quantised bases ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on a CPU
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_decoded_as_it_computes(bits: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tiny_models.save_model(tiny_models.model("llama", VOCABULARY, **sizes), tiny_models.words_tokenizer(), tmp_path)
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    quantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**kind), device_map="cpu")
    quantised.requires_grad_(False).eval()
    weight = quantised.model.layers[0].mlp.up_proj.weight
    if bits == 4:  # before the first forward pass, which changes the layout of the codes
        reference = functional.dequantize_4bit(weight.data.clone(), weight.quant_state).float()
    else:
        reference = weight.data.float() * weight.SCB[:, None] / 127
    loaded = LoadedModel(quantised, tiny_models.words_tokenizer(), torch.device("cpu"), "fp32", (1,), 0)
    backbone = Backbone(loaded, LoraConfig(rank=4, alpha=8.0), "tiny")
    backbone.roles.add("policy", seed=1)  # B = 0: the merged weights are the base's
    assert is_quantised(backbone.model)
    before = logits(backbone, "policy")
    merged = merged_language_model(backbone, "policy")
    found = merged.get_parameter("model.layers.0.mlp.up_proj.weight")
    close(found.float(), reference, 0.01 * reference.abs().max().item())  # of a computation in half precision
    assert not is_quantised(merged)
    assert not hasattr(merged.config, "quantization_config")
    assert torch.equal(logits(backbone, "policy"), before)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on a CPU
@pytest.mark.parametrize(("precision", "step"), [("int8", 0.5 / 127), ("nf4", 0.16)])
def test_a_quantised_gpt2_is_merged_in_the_layout_of_its_own_layers(precision: str, step: float, tmp_path: Path) -> None:
    """Its layers hold [inputs, outputs], the coded ones [outputs, inputs]; a square one would be transposed silently.

    `step` is half the widest gap between two codes, as a share of the largest weight that shares a scale: 1/127 in int8, and
    0.3 in nf4 (between -1 and -0.70; with its own scales rounded to 8 bits, a little more).
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain = tiny_models.model("gpt2", 384, n_embd=64, n_head=8)
    folder = tiny_models.save_model(plain, tiny_models.words_tokenizer(), tmp_path / "model")
    loaded = load_model(str(folder), device="cpu", precision=precision)
    backbone = with_roles(Backbone(loaded, LoraConfig(rank=4, alpha=8.0), "tiny-gpt2"))
    merged = merged_language_model(backbone, "policy", torch.float32)
    own = backbone.roles.parameters("policy")
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        path = f"transformer.h.1.{layer}"
        update = 2.0 * own[f"{path}.lora_B.policy.weight"].detach() @ own[f"{path}.lora_A.policy.weight"].detach()
        weight = plain.get_parameter(f"{path}.weight")
        tolerance = (step + 2**-8) * weight.abs().max().item()  # and the rounding of the pass that decodes, in bf16
        close(merged.get_parameter(f"{path}.weight"), weight.detach() + update.T, tolerance)
    merged.save_pretrained(tmp_path / "policy")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")(input_ids=IDS).logits.detach()
    away = (logits(backbone, "base") - logits(backbone, "policy")).abs().mean()
    assert (alone - logits(backbone, "policy").float()).abs().mean() < away / 10
    expected = scores(backbone)
    merged_classifier(backbone, "evaluator-0", 384, torch.float32).save_pretrained(tmp_path / "evaluator")
    close(classifier_scores(tmp_path / "evaluator"), expected, 0.05 * expected.abs().max().item())
