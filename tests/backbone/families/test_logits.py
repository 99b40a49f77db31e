from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.backbone.families.logits import logit_cap, logit_scale

LLAMA = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1, "shared_intermediate_size": 16}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "sizes", "scale"),
    [
        ("llama", {}, 1.0),
        ("granite", {"logits_scaling": 4.0}, 0.25),
        ("granitemoe", {"logits_scaling": 8.0, **EXPERTS}, 0.125),
        ("granitemoeshared", {"logits_scaling": 8.0, **EXPERTS}, 0.125),
        ("granitemoehybrid", {"logits_scaling": 8.0, "layer_types": ["attention", "attention"], **EXPERTS, **MAMBA}, 0.125),
        ("granite_swa", {"logits_scaling": 2.0}, 0.5),
        ("granitemoe_swa", {"logits_scaling": 2.0, **EXPERTS}, 0.5),
        ("minicpm3", {"hidden_size": 64, "dim_model_base": 16, "num_key_value_heads": 4, **MLA}, 0.25),
        ("cohere", {"logit_scale": 0.3}, 0.3),
        ("cohere2", {"logit_scale": 0.3}, 0.3),
        ("hyperclovax", {"logits_scaling": 0.4}, 0.4),
    ],
)
def test_the_scale_is_the_ratio_of_the_models_logits_to_its_output_layer(
    kind: str, sizes: dict[str, object], scale: float
) -> None:
    config = CONFIG_MAPPING[kind](**{**LLAMA, **sizes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 9, 2, 17]])
    with torch.no_grad():
        plain = model.get_output_embeddings()(model.base_model(ids, use_cache=False).last_hidden_state)
        logits = model(ids, use_cache=False).logits
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(logits, plain * scale, rtol=1e-5, atol=1e-6)
    assert logit_scale(config) == pytest.approx(scale)
    assert logit_cap(config) is None


@pytest.mark.parametrize("family", ["gemma2", "gemma3_vision"])
def test_the_cap_is_read_from_the_part_that_reads_text(family: str) -> None:
    config = tiny_models.tiny_config(family, 40)
    config.get_text_config().final_logit_softcapping = 3.0
    assert logit_cap(config) == 3.0
    assert logit_scale(config) == 1.0


def test_capped_logits_stay_below_the_cap_and_equal_the_models() -> None:
    backbone = tiny_models.backbone("gemma2", final_logit_softcapping=1.5)
    ids = torch.tensor([[5, 9, 2, 17]])
    with torch.no_grad(), backbone.acting_as(BASE):
        found = backbone.logits(backbone.hidden(ids, torch.ones_like(ids)))
        expected = backbone.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert 1.4 < found.abs().max() <= 1.5
