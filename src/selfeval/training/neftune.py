"""NEFTune: uniform noise on the input embeddings while fine-tuning (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

    e_t <- e_t + alpha / sqrt(L D) * u_t,   u_t ~ Uniform(-1, 1)^D, for the L tokens of a document

Shapes: B rows, T tokens of a row, L tokens of a document, D width of an embedding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from selfeval.backbone.roles import Backbone

__all__ = ["Noise", "embedding_noise", "neftune_noise"]

Noise = Callable[[int, int, int], Tensor]
"""Returns the noise `[L, D]` of a document, from its number in the batch, L and D."""


def neftune_noise(alpha: float, seed: str) -> Noise:
    """Return the noise of the documents of a batch.

    It depends on the document and the seed only, so a resumed training, other micro-batches and other rows get the same noise.

    Args:
        alpha: scale of the noise, > 0; the paper uses 5, 10 and 15.
        seed: seed of the batch.
    """

    def noise(number: int, length: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/{number}").getrandbits(63))
        uniform_LD = 2.0 * torch.rand(length, width, generator=generator) - 1.0
        return uniform_LD * (alpha / math.sqrt(length * width))

    return noise


@contextmanager
def embedding_noise(backbone: Backbone, rows: Sequence[Sequence[tuple[int, int]]], noise: Noise | None) -> Iterator[None]:
    """Add noise to the input embeddings in the forward passes inside the block; padding gets none.

    The backward pass belongs inside the block as well, because it may recompute the embeddings.

    Args:
        backbone: the model.
        rows: for each row of the batch, number and length of each of its documents.
        noise: Optional. None adds nothing.
    """
    if noise is None:
        yield
        return

    def add(module: Any, arguments: Any, embedded_BTD: Tensor) -> Tensor:
        added_BTD = torch.zeros(embedded_BTD.shape, dtype=torch.float32)
        for row, documents in enumerate(rows):
            start = 0
            for number, length in documents:
                added_BTD[row, start : start + length] = noise(number, length, embedded_BTD.shape[-1])
                start += length
        return embedded_BTD + added_BTD.to(embedded_BTD)

    handle = backbone.model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
