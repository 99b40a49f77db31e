"""Random two-layer models of every family that the project names, for the conformance tests.

The page docs/concepts/families.md is made from this table and from those tests (docs/generate_families.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING

__all__ = ["EOS", "FAMILIES", "PAD", "REFUSED", "WINDOW", "Family", "family_config"]

PAD, EOS = 0, 1
WINDOW = 8
"""Sliding window of every family that has one: shorter than some prompts and than most replies of the tests."""

# Peaked random weights: flat ones would hide mistakes.
_COMMON = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "initializer_range": 0.25}
_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_WIDTH, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
_HEADS = {"head_dim": 8}
_UNTIED = {"tie_word_embeddings": False}
"""For Gemma, whose embeddings are so large that a tied random model only repeats its last token."""
_MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_DENSE = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_FUSED_MLP = (*_ATTENTION, "gate_up_proj", "down_proj")
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_MLA_TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

_OPT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 512,
    "dropout": 0.0, "init_std": 0.25,
}  # fmt: skip
_OPT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

_EXPERTS = "experts and their router stay as they are"


@dataclass(frozen=True)
class Family:
    """A family and its expected properties.

    Attributes:
        title: its name in the table.
        model_type: as in `config.json`.
        examples: published models of it.
        sizes: of the random model, on top of the common ones.
        targets: names of the modules that get adapters, with how many there are in the two layers.
        asked: value of `backbone.lora.targets`.
        window: tokens that the layers with a sliding window see; None without one.
        note: advice for users.
        nested: sizes of the parts of a model with several.
    """

    title: str
    model_type: str
    examples: str
    sizes: Mapping[str, Any]
    targets: Mapping[str, int]
    asked: str | tuple[str, ...] = "all-linear"
    window: int | None = None
    note: str = ""
    nested: Mapping[str, Any] = field(default_factory=dict)


def _both(names: tuple[str, ...]) -> dict[str, int]:
    return dict.fromkeys(names, 2)


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", "llama", "Llama 2 and 3, TinyLlama, SmolLM", {**_LLAMA, **_HEADS}, _both(_DENSE)),
    "qwen2": Family("Qwen 2, 2.5", "qwen2", "Qwen2.5-0.5B to 72B", _LLAMA, _both(_DENSE)),
    "qwen3": Family("Qwen 3", "qwen3", "Qwen3-0.6B to 32B", {**_LLAMA, **_HEADS}, _both(_DENSE)),
    "qwen3_moe": Family(
        "Qwen 3 MoE", "qwen3_moe", "Qwen3-30B-A3B",
        {**_LLAMA, **_HEADS, **_QWEN_MOE},
        _both(_ATTENTION), note=_EXPERTS,
    ),
    "qwen3_moe_experts": Family(
        "Qwen 3 MoE, experts named", "qwen3_moe", "as above", {**_LLAMA, **_HEADS, **_QWEN_MOE},
        {**_both(_ATTENTION), "experts": 4}, asked=(*_ATTENTION, "gate_proj", "up_proj", "down_proj"),
        note="`backbone.lora.targets` names attention, `gate_proj`, `up_proj`, `down_proj`",
    ),
    "glm4": Family("GLM-4", "glm4", "GLM-4-9B-0414, GLM-4-32B-0414", {**_LLAMA, **_HEADS}, _both(_FUSED_MLP)),
    "glm": Family("GLM-4 (June 2024)", "glm", "glm-4-9b-chat-hf", {**_LLAMA, **_HEADS}, _both(_FUSED_MLP)),
    "mistral": Family(
        "Mistral", "mistral", "Mistral-7B, Mistral-Nemo", {**_LLAMA, **_HEADS, "sliding_window": WINDOW}, _both(_DENSE),
        window=WINDOW,
    ),
    "mixtral": Family(
        "Mixtral", "mixtral", "Mixtral-8x7B", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        _both(_ATTENTION), note=_EXPERTS,
    ),
    "mixtral_experts": Family(
        "Mixtral, experts named", "mixtral", "as above", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        {**_both(_ATTENTION), "experts": 4}, asked=(*_ATTENTION, "w1", "w2", "w3"),
        note="`backbone.lora.targets` names attention, `w1`, `w2`, `w3`",
    ),
    "gemma2": Family(
        "Gemma 2", "gemma2", "gemma-2-2b to 27b",
        {
            **_LLAMA, **_HEADS, "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 5.0, **_UNTIED,
        },
        _both(_DENSE), window=WINDOW, note="logits and attention are capped",
    ),
    "gemma3": Family(
        "Gemma 3 (text)", "gemma3_text", "gemma-3-270m, gemma-3-1b",
        {
            **_LLAMA, **_HEADS, "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"], **_UNTIED,
        },
        _both(_DENSE), window=WINDOW,
    ),
    "gemma3_vision": Family(
        "Gemma 3 (with pictures)", "gemma3", "gemma-3-4b to 27b",
        {"mm_tokens_per_image": 4, "image_token_index": 39, "boi_token_index": 37, "eoi_token_index": 38},
        _both(_DENSE), window=WINDOW, note="text only; the picture tower gets no adapter",
        nested={
            "text_config": {
                **_LLAMA, **_HEADS, "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"], **_UNTIED,
            },
            "vision_config": _VISION,
        },
    ),
    "phi3": Family(
        "Phi-3", "phi3", "Phi-3-mini, Phi-3.5-mini, Phi-4-mini", {**_LLAMA, "sliding_window": WINDOW},
        _both(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")), window=WINDOW,
    ),
    "gpt2": Family(
        "GPT-2", "gpt2", "gpt2 to gpt2-xl, DistilGPT2",
        {
            "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        {"c_attn": 2, "c_proj": 4, "c_fc": 2}, note="positions end at 1024",
    ),
    "gpt_neox": Family(
        "GPT-NeoX", "gpt_neox", "Pythia, GPT-NeoX-20B",
        {**_WIDTH, "intermediate_size": 48, "max_position_embeddings": 512}, _both(_NEOX),
    ),
    "bloom": Family(
        "Bloom", "bloom", "bloom-560m to 176B, BLOOMZ", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, _both(_NEOX),
        note="ALiBi: no position ids; the mask places the tokens",
    ),
    "falcon": Family(
        "Falcon", "falcon", "falcon-7b", {**_WIDTH, "multi_query": True, "max_position_embeddings": 512}, _both(_NEOX),
    ),
    "falcon_40b": Family(
        "Falcon (grouped heads)", "falcon", "falcon-40b, falcon-11B",
        {**_WIDTH, "new_decoder_architecture": True, "num_kv_heads": 2, "max_position_embeddings": 512}, _both(_NEOX),
    ),
    "falcon_rw": Family(
        "Falcon (ALiBi)", "falcon", "falcon-rw-1b",
        {**_WIDTH, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}, _both(_NEOX),
    ),
    "olmo2": Family("OLMo 2", "olmo2", "OLMo-2-1B to 32B", _LLAMA, _both(_DENSE)),
    "deepseek_v2": Family(
        "DeepSeek V2", "deepseek_v2", "DeepSeek-V2-Lite", {**_LLAMA, **_MLA}, _both(_MLA_TARGETS),
        note=f"{_EXPERTS}, and so do shared experts and the first dense layers",
    ),
    "deepseek_v3": Family(
        "DeepSeek V3", "deepseek_v3", "DeepSeek-V3, DeepSeek-R1, Moonlight", {**_LLAMA, **_MLA}, _both(_MLA_TARGETS),
        note="as DeepSeek V2",
    ),
    "gpt_oss": Family(
        "gpt-oss", "gpt_oss", "gpt-oss-20b",
        {
            **_LLAMA, **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        _both(_ATTENTION), window=WINDOW, note=_EXPERTS,
    ),
    "granite": Family(
        "Granite", "granite", "granite-3.3-2b, 8b",
        {
            **_LLAMA, "logits_scaling": 0.25, "attention_multiplier": 0.3, "residual_multiplier": 0.8,
            "embedding_multiplier": 2.0,
        },
        _both(_DENSE), note="logits are divided by `logits_scaling`",
    ),
    "granitemoe": Family(
        "Granite MoE", "granitemoe", "granite-3.1-1b-a400m, 3b-a800m",
        {**_LLAMA, "logits_scaling": 0.25, "num_local_experts": 4, "num_experts_per_tok": 2}, _both(_ATTENTION),
        note=f"logits as Granite; {_EXPERTS}",
    ),
    "cohere": Family(
        "Cohere", "cohere", "c4ai-command-r-v01, aya-23-8B", {**_LLAMA, "logit_scale": 0.25}, _both(_DENSE),
        note="logits are multiplied by `logit_scale`",
    ),
    "llama4": Family(
        "Llama 4", "llama4_text", "Llama-4-Scout, Llama-4-Maverick",
        {
            **_LLAMA, **_HEADS, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2, "use_qk_norm": False,
        },
        _both(_DENSE), note=f"as a text model (`llama4_text`); {_EXPERTS}, the shared one and dense layers get adapters",
    ),
    "opt": Family("OPT", "opt", "opt-125m, opt-1.3b to 66b", {**_OPT, "word_embed_proj_dim": 32}, _both(_OPT_TARGETS)),
    "opt_projected": Family(
        "OPT, projected", "opt", "opt-350m", {**_OPT, "word_embed_proj_dim": 16},
        {**_both(_OPT_TARGETS), "project_in": 1, "project_out": 1},
        note="hidden states are narrower than the layers: heads are as wide as the output layer reads them",
    ),
    "mamba": Family(
        "Mamba", "mamba", "mamba-130m-hf to 2.8b-hf", {**_MAMBA, "time_step_rank": 4}, _both(("in_proj", "x_proj")),
        note="the mixer reads the weights of `out_proj` and `dt_proj` itself, past any adapter",
    ),
    "falcon_mamba": Family(
        "Falcon Mamba", "falcon_mamba", "falcon-mamba-7b", {**_MAMBA, "time_step_rank": 4}, _both(("in_proj", "x_proj")),
        note="as Mamba",
    ),
    "mamba2": Family(
        "Mamba 2", "mamba2", "mamba2-130m, Mamba-Codestral-7B",
        {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}, {"in_proj": 2},
        note="the mixer's fused kernel reads the weight of `out_proj` itself, past any adapter",
    ),
    "falcon_h1": Family(
        "Falcon H1", "falcon_h1", "Falcon-H1-0.5B to 34B",
        {
            **_LLAMA, **_HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1,
            "mamba_d_state": 4, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5,
        },
        _both((*_DENSE, "in_proj")), note="attention and Mamba 2 side by side; `out_proj` as in Mamba 2",
    ),
}  # fmt: skip
"""By the name used in tests."""

REFUSED: dict[str, Family] = {
    "rwkv": Family(
        "RWKV", "rwkv", "rwkv-4-169m-pile",
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 128}, {},
        note="has a cache of an unsupported form",
    ),
}  # fmt: skip
"""Families that the loop refuses, with the reason."""


def family_config(name: str, vocabulary: int, **changes: Any) -> Any:
    """Return the config of a tiny model of this family; `changes` override its settings."""
    family = {**FAMILIES, **REFUSED}[name]
    common = {"vocab_size": vocabulary, **_COMMON}
    nested = {part: dict(sizes) for part, sizes in family.nested.items()}
    if "text_config" in nested:
        nested["text_config"] |= common
    values = {**common, **family.sizes, **nested, **changes}
    return CONFIG_MAPPING[family.model_type](**values)
