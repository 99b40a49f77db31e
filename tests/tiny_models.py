"""Tiny random models of several families, and a small tokenizer trained on the spot: everything the tests need, no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from selfeval.backbone.load import LoadedModel
from selfeval.backbone.roles import Backbone
from selfeval.config import LoraConfig
from tiny_families import EOS, PAD, family_config

__all__ = [
    "EOS",
    "FAMILIES",
    "PAD",
    "backbone",
    "bytes_tokenizer",
    "full_logprobs",
    "model",
    "save_model",
    "scramble",
    "tiny_config",
    "words_tokenizer",
]

FAMILIES = ("llama", "qwen3", "gpt2", "glm4")
"""Families for the tests of every package; test_conformance.py covers all of them (tiny_families)."""

_TEXT = [
    "Question: what is two plus three? Answer: five.",
    "Verdict: A. Verdict: B. Verdict: tie.",
    "Better response: 1. Better response: 2. Better response: neither.",
    "Reply A and reply B follow. Decide which reply is better, step by step.",
    "Tom has seven apples and gives away two of them. How many apples are left?",
]


def tiny_config(family: str, vocabulary: int, **changes: Any) -> Any:
    """A config of two small layers with peaked random weights (see tiny_families)."""
    return family_config(family, vocabulary, **changes)


def model(family: str, vocabulary: int = 40, *, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode, fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(tiny_config(family, vocabulary, **changes))
    return made.eval()


def backbone(
    family: str = "llama",
    vocabulary: int = 40,
    *,
    seed: int = 0,
    rank: int = 4,
    eos: Sequence[int] = (EOS,),
    dtype: torch.dtype = torch.float32,
    targets: str | tuple[str, ...] = "all-linear",
    **changes: Any,
) -> Backbone:
    """A backbone on a random model; its tokenizer is `words_tokenizer()`."""
    made = model(family, vocabulary, seed=seed, **changes)
    made.to(dtype).requires_grad_(False)
    loaded = LoadedModel(made, words_tokenizer(), torch.device("cpu"), "fp32", tuple(eos), PAD)
    return Backbone(loaded, LoraConfig(rank=rank, alpha=2.0 * rank, targets=targets), f"tiny-{family}-{seed}")


def words_tokenizer(special: Sequence[str] = ("<pad>", "<eos>"), vocabulary: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with pad 0 and eos 1."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained(tuple(special), vocabulary)))
    tokenizer.add_special_tokens({"pad_token": special[0], "eos_token": special[1]})
    return tokenizer


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: no pre-tokenizer, ▁ for a space, unknown characters as bytes."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=list(ascii_letters), show_progress=False
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.train_from_iterator(["Tom has seven apples. " * 4], trainer)
    values = json.loads(core.to_str())
    values["pre_tokenizer"] = None
    values["added_tokens"] = values["added_tokens"][:2]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(values)))
    tokenizer.add_special_tokens({"unk_token": "<unk>", "eos_token": "<eos>"})
    return tokenizer


@cache
def _trained(special: tuple[str, ...], vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return str(tokenizer.to_str())


def scramble(backbone: Backbone, role: str, seed: int = 7, size: float = 0.2) -> None:
    """Set every weight of a role to a random value, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.roles.parameters(role).values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def full_logprobs(model: Any, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """`[T, V]` log-probs of what follows each token: one plain pass, one sequence, no cache, no padding."""
    logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0].float()
    return torch.log_softmax(logits / temperature, dim=-1)


def save_model(made: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write an ordinary model folder."""
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
