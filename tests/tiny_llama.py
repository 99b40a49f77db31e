"""Write a Llama with random weights and the embedded model's tokenizer: `python tests/tiny_llama.py FOLDER`.

It needs only the tokenizer's files of this package, so the smoke test can run it against an installed wheel.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

__all__ = ["write"]


def write(folder: Path) -> None:
    found = importlib.util.find_spec("selfeval")
    assert found is not None
    assert found.origin is not None
    tokenizer = AutoTokenizer.from_pretrained(Path(found.origin).parent / "lab" / "word_problems")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
