"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B from the folders they were published in, without the code in those folders.

All three call themselves `model_type: chatglm`. The first is a separate model (`chatglm_v1`). The other two compute what
transformers' GLM computes, so that they become a `GlmForCausalLM`: weights renamed, the packed projection cut in three. Saved
again, they are ordinary GLM folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from selfeval.backbone.families.chatglm_tokenizer import (
    ChatGLM1Tokenizer,
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLMTokenizer,
)
from selfeval.backbone.families.chatglm_v1 import ChatGLMConfig, ChatGLMForCausalLM
from selfeval.errors import ModelError

__all__ = [
    "ChatGLM2Config",
    "ChatGLM2ForCausalLM",
    "PublishedConfig",
    "generation",
    "glm_fields",
    "glm_weights",
    "load_tokenizer",
]

_TOKENIZERS: dict[int, type[ChatGLMTokenizer]] = {1: ChatGLM1Tokenizer, 2: ChatGLM2Tokenizer, 3: ChatGLM3Tokenizer}

_FIRST_REVISION = 150528
"""Vocabulary of ChatGLM-6B as it was in March 2023, with 20,000 image tokens in front."""

_WANTED_OF_1 = {"position_encoding_2d": (True,), "pre_seq_len": (None, 0), "quantization_bit": (None, 0)}
_WANTED_OF_2 = {
    "rmsnorm": (True,),
    "post_layer_norm": (True,),
    "apply_residual_connection_post_layernorm": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (True,),
    "multi_query_attention": (True,),
    "pre_seq_len": (None, 0),
    "quantization_bit": (None, 0),
}
"""Switches of the published code and the values that this version computes; a missing one means the first value."""

_RENAMED = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
_RENAMED_IN_LAYER = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
_LAYER = "transformer.encoder.layers."
_PACKED = "self_attention.query_key_value"


class PublishedConfig(ChatGLMConfig):
    """Config of `model_type: chatglm`, which maps a published config.json to the config of the actual model."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `ChatGLMConfig` of generation 1, or a `ChatGLM2Config` of generation 2 or 3.

        Raises:
            ModelError: the folder holds pickles, or a variant that this version does not compute.
        """
        name = str(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "")
        # These two name the code in the folder and its classes, which are not used.
        fields = {k: v for k, v in config_dict.items() if k not in ("auto_map", "architectures")}
        _refuse_pickles(name)
        # A field of generations 2 and 3 only.
        if "padded_vocab_size" in fields:
            fields = glm_fields(fields, name) | {"architectures": ["GlmForCausalLM"], "_name_or_path": name}
            return ChatGLM2Config.from_dict(fields, **kwargs)
        _check_switches(fields, _WANTED_OF_1, name)
        if fields.get("vocab_size") == _FIRST_REVISION:
            raise ModelError(
                f"{name} is the March 2023 revision of ChatGLM-6B (vocabulary {_FIRST_REVISION}), whose position ids differ; "
                "use the "
                "final revision (vocabulary 130528)"
            )
        return ChatGLMConfig.from_dict(fields | {"architectures": ["ChatGLMForCausalLM"]}, **kwargs)


class ChatGLM2Config(GlmConfig):
    """The config of a GLM whose weights still have the names of ChatGLM2 and ChatGLM3."""


class ChatGLM2ForCausalLM(GlmForCausalLM):
    """Only used for loading, which returns a plain `GlmForCausalLM`."""

    config_class = ChatGLM2Config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Load the published weights, converted; takes what transformers' own method takes (precision, placement, ...)."""
        name = str(pretrained_model_name_or_path)
        plain = GlmConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
        weights = dict(glm_weights(_tensors(name), plain))
        return GlmForCausalLM.from_pretrained(None, *args, config=plain, state_dict=weights, **kwargs)


AutoConfig.register("chatglm", PublishedConfig, exist_ok=True)
AutoModelForCausalLM.register(ChatGLMConfig, ChatGLMForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(ChatGLM2Config, ChatGLM2ForCausalLM, exist_ok=True)


# -- which one it is ------------------------------------------------------------------------------------------------------


def generation(name: str, config: dict[str, Any]) -> int:
    """1, 2 or 3: which ChatGLM a folder holds.

    2 and 3 have the same config fields and the same tokenizer file. They differ in the published tokenizer code (only that of
    3 knows roles), which is read here and never run, and the names that the config and the folder have.

    Raises:
        ModelError: versions 2 and 3 cannot be distinguished.
    """
    if "padded_vocab_size" not in config:
        return 1
    code = Path(name) / "tokenization_chatglm.py"
    if code.is_file():
        return 3 if "<|assistant|>" in code.read_text(encoding="utf-8") else 2
    for text in (str(config.get("_name_or_path", "")), Path(name).name):
        found = [number for number in (2, 3) if f"chatglm{number}" in text.lower()]
        if len(found) == 1:
            return found[0]
    raise ModelError(
        f"{name} is ChatGLM2 or ChatGLM3, and its files do not say which (their prompts differ); add the published "
        "tokenization_chatglm.py (it is read, never executed), or put chatglm2 or chatglm3 in the folder's name"
    )


def _check_switches(fields: dict[str, Any], wanted: dict[str, tuple[Any, ...]], name: str) -> None:
    for switch, allowed in wanted.items():
        found = fields.get(switch, allowed[0])
        if found not in allowed:
            raise ModelError(
                f"{name} has {switch} = {json.dumps(found)} in its config.json; for ChatGLM only {switch} = "
                f"{json.dumps(allowed[0])} is supported: use the original checkpoint, without quantisation or a prefix encoder"
            )


def _refuse_pickles(name: str) -> None:
    folder = Path(name)
    if list(folder.glob("pytorch_model*.bin")) and not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name} stores its weights as pickles (pytorch_model*.bin), which can execute code and are never loaded; convert "
            "them to safetensors (see docs/concepts/chatglm.md)"
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, from its SentencePiece file alone; code and chat templates in it are ignored.

    Raises:
        ModelError: the file is not there.
    """
    declared = get_tokenizer_config(name).get("tokenizer_class")
    kinds = {kind.__name__: kind for kind in _TOKENIZERS.values()}
    kind = kinds.get(declared) or _TOKENIZERS[generation(name, PreTrainedConfig.get_config_dict(name)[0])]
    wanted = kind.vocab_files_names["vocab_file"]
    file = cached_file(name, wanted, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ModelError(f"{name} has no {wanted}, ChatGLM's SentencePiece file; add the published file")
    return kind(str(file), name_or_path=name)


# -- generations 2 and 3 as GLM -------------------------------------------------------------------------------------------


def glm_fields(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields of a `GlmConfig` that computes what a config.json of ChatGLM2 or ChatGLM3 asks for.

    Raises:
        ModelError: it asks for something else.
    """
    _check_switches(fields, _WANTED_OF_2, name)
    return {
        "vocab_size": fields["padded_vocab_size"],
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["ffn_hidden_size"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_attention_heads"],
        "num_key_value_heads": fields["multi_query_group_num"],
        "head_dim": fields["kv_channels"],
        "max_position_embeddings": fields["seq_length"],
        "rms_norm_eps": fields["layernorm_epsilon"],
        "rope_parameters": _rope(fields, name),
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": fields.get("eos_token_id", 2),
        "pad_token_id": fields.get("pad_token_id", 0),
    }


def _rope(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Half of each head is turned; the 32k variants divide positions (2) or raise the base (3) by `rope_ratio`."""
    ratio = float(fields.get("rope_ratio") or 1.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1.0:
        return rope
    if generation(name, fields) == 2:
        return rope | {"rope_type": "linear", "factor": ratio}
    return rope | {"rope_theta": 10000.0 * ratio}


def glm_weights(published: Iterator[tuple[str, Tensor]], config: GlmConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a `GlmForCausalLM` from those of a published ChatGLM2 or ChatGLM3.

    The packed projection holds query, key and value one after the other: heads, groups, groups times `head_dim` rows. Stored
    rotary frequencies are left out (the model makes its own); an unknown tensor keeps its name, for the loader to report.
    """
    cached = config.num_key_value_heads * config.head_dim
    sizes = (config.num_attention_heads * config.head_dim, cached, cached)
    for name, tensor in published:
        stem, _, kind = name.rpartition(".")
        index, _, part = stem.removeprefix(_LAYER).partition(".")
        if kind == "inv_freq":
            continue
        if stem.startswith(_LAYER) and part == _PACKED:
            for letter, rows in zip("qkv", tensor.split(sizes), strict=True):
                yield f"model.layers.{index}.self_attn.{letter}_proj.{kind}", rows.contiguous()
        elif stem.startswith(_LAYER):
            yield f"model.layers.{index}.{_RENAMED_IN_LAYER.get(part, part)}.{kind}", tensor
        else:
            yield f"{_RENAMED.get(stem, stem)}.{kind}", tensor


def _tensors(name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, from one file or from the shards that its index names."""
    for path in _files(name):
        with safe_open(path, "pt") as file:
            yield from ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118


def _files(name: str) -> list[str]:
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [str(cached_file(name, "model.safetensors"))]
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return [str(cached_file(name, shard)) for shard in sorted(set(names))]
