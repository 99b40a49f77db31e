"""A chat model that writes texts like given ones, without training: a Llama whose weights are a table of bigrams."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["write"]

_READ, _WRITTEN = 8, 0.05
"""Dimensions that attention writes to, and the size of a value there."""
_SPECIAL = ("<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")
_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write(folder: Path, texts: Sequence[str], *, whims: float = 0.0) -> Path:
    """Write a model folder.

    Args:
        folder: where to write it.
        texts: what a reply looks like.
        whims: Optional. Deviation, in nats, of a random influence of all earlier tokens on the next one. Without it (default)
            only the last token counts, so all replies get the same verdict.
    """
    tokenizer = _tokenizer(texts)
    _model(tokenizer, texts, whims).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[*_SPECIAL], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "additional_special_tokens": list(_SPECIAL[2:])}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=_CHAT, **special)


def _model(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], whims: float) -> LlamaForCausalLM:
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + _READ,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.mlp.down_proj.weight.zero_()
        # The normalised embedding of a token is its unit vector times this root; attention writes to the other dimensions.
        root = (size + _READ) ** 0.5
        model.model.embed_tokens.weight.copy_(torch.eye(size, size + _READ))
        model.lm_head.weight[:, :size] = _log_bigrams(tokenizer, texts, size).T / root
        _read(layer.self_attn, model.lm_head, size, whims)
    return model


def _read(attention: torch.nn.Module, head: torch.nn.Linear, size: int, whims: float) -> None:
    """Let attention write a random function of the earlier tokens to its dimensions, and the head read it."""
    drawn = torch.Generator().manual_seed(0)
    root = (size + _READ) ** 0.5
    for name in ("q_proj", "k_proj", "v_proj"):  # queries and keys of deviation 2: attention to few tokens
        torch.nn.init.normal_(getattr(attention, name).weight, std=(1.0 if name == "v_proj" else 2.0) / root, generator=drawn)
    written = attention.o_proj.weight.zero_()
    if whims:
        # So small that the norm of the hidden state remains that of its embedding.
        torch.nn.init.normal_(written[size:], std=_WRITTEN / _READ**0.5, generator=drawn)
        torch.nn.init.normal_(head.weight[:, size:], std=whims / (_WRITTEN * root * _READ**0.5), generator=drawn)


def _log_bigrams(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], size: int) -> torch.Tensor:
    """Return `[size, size]` log-probabilities of a token (column) after a token (row)."""
    counts = torch.full((size, size), 1e-9)
    counts[:, 1] += 1e-6
    begin = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for text in texts:
        ids = [begin, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        for first, second in pairwise(ids):
            counts[first, second] += 1
    return torch.log(counts / counts.sum(1, keepdim=True))
