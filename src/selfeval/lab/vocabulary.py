"""Tokenizer of the embedded model: byte-level BPE on the domain's text, with single tokens for numbers and markers."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from selfeval.lab.corpus import MARKERS, draw_document
from selfeval.lab.domain import LARGEST

__all__ = ["VOCABULARY_SIZE", "train_tokenizer"]

VOCABULARY_SIZE = 640


def _texts(documents: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    numbers = " ".join(str(n) for n in range(LARGEST + 1))
    for _ in range(documents):
        # Every number in every text, so that no merge of digits is too rare to be learned.
        yield "".join(text if text not in MARKERS else " " for text, _ in draw_document(rng)) + f" {numbers}"


def train_tokenizer(seed: int = 0, documents: int = 3000) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `VOCABULARY_SIZE` tokens; it encodes any text, with one token per word of the domain.

    Raises:
        ValueError: a number of the domain is not a single token (raise `VOCABULARY_SIZE`).
    """
    core = Tokenizer(models.BPE())
    # A word has the same token at the start of a text as within it.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(MARKERS),
        # All 256 bytes, so any text can be encoded, also in other languages.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(documents, seed), trainer)
    split = [n for n in range(LARGEST + 1) if len(core.encode(str(n)).ids) != 1]
    if split:
        raise ValueError(f"numbers {split} are not single tokens at vocabulary size {VOCABULARY_SIZE}; raise it")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>", model_max_length=512
    )
