"""Pooled hidden states of the backbone's layers.

Shapes: B texts of a pass, N texts, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from selfeval.backbone.budget import Phase
from selfeval.backbone.depth import decoder_layers, first_layers
from selfeval.backbone.roles import Backbone
from selfeval.errors import ModelError
from selfeval.quality.embeddings.protocol import Vectors

__all__ = ["Pool", "Pooling", "layer_count", "pooled_states", "token_rows"]

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Pool:
    """A layer, counted from 1, and how the states of its tokens become one vector.

    `mean` is the mean over the tokens of the text, `last` the state of its last token.
    """

    layer: int
    pooling: Pooling

    def __str__(self) -> str:
        return f"layer{self.layer}-{self.pooling}"


def layer_count(backbone: Backbone) -> int:
    """Return the number of the decoder's layers."""
    return int(backbone.model.config.get_text_config().num_hidden_layers)


def token_rows(backbone: Backbone, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens; empty for an empty text.

    A text that is longer than the model's context is cut at its end, with room for the token that begins a sequence.
    """
    tokenizer, context = backbone.loaded.tokenizer, backbone.loaded.context_length
    most = None if context is None else context - len(_beginning(backbone))
    return [[int(i) for i in tokenizer.encode(text, add_special_tokens=False)[:most]] for text in texts]


def _beginning(backbone: Backbone) -> list[int]:
    """Return the token that begins a sequence, if the tokenizer has one.

    Models give the first token a state of its position rather than of its meaning (an attention sink, Xiao et al. 2023,
    https://arxiv.org/abs/2309.17453). It is read, and left out of the pooling.
    """
    begin = backbone.loaded.tokenizer.bos_token_id
    return [] if begin is None or begin >= backbone.output_head.vocabulary else [int(begin)]


@torch.no_grad()
def pooled_states(
    backbone: Backbone, role: str, rows: Sequence[Sequence[int]], pools: Sequence[Pool], batch_tokens: int
) -> dict[Pool, Vectors]:
    """Pool the hidden states of texts, for several layers in one pass.

    Each token's state is scaled to length 1 before the mean, because a few tokens have states a thousand times as large as
    the others (Sun et al. 2024, https://arxiv.org/abs/2402.17762). The last layer is read after the model's final norm.

    Args:
        backbone: the model.
        role: the role that acts.
        rows: token ids of each text (`token_rows`), at least one in each.
        pools: layers and poolings; the layers after the last of them are not computed.
        batch_tokens: maximum tokens of a pass, padding included.

    Returns:
        `[N, D]` for each of the pools.

    Raises:
        ModelError: the family does not compute its layers from a list, and another layer than the last one is read.
        MemoryLimitError: a single text does not fit in memory.
    """
    begin, found = _beginning(backbone), {pool: np.zeros((len(rows), 0), np.float32) for pool in pools}

    def of_group(group: list[int]) -> dict[Pool, Vectors]:
        return _of_group(backbone, [[*begin, *rows[i]] for i in group], pools, len(begin))

    sizes = [len(begin) + len(row) for row in rows]
    with backbone.acting_as(role):
        backbone.refuse_mixed_rows("embedding in groups of similar length")
        for group, vectors in backbone.budget.in_groups(Phase.SCORE, sizes, batch_tokens, of_group):
            for pool, pooled_BD in vectors.items():
                if found[pool].shape[1] != pooled_BD.shape[1]:
                    found[pool] = np.zeros((len(rows), pooled_BD.shape[1]), np.float32)
                found[pool][group] = pooled_BD
    return found


def _of_group(backbone: Backbone, rows: Sequence[Sequence[int]], pools: Sequence[Pool], begin: int) -> dict[Pool, Vectors]:
    """Pool the states of one pass.

    Args:
        begin: number of tokens at the beginning of each row that are not pooled.
    """
    width, device, pad = max(map(len, rows)), backbone.loaded.device, backbone.loaded.pad_id
    ids_BT = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    text_BT = mask_BT.bool() & (torch.arange(width, device=device) >= begin)
    found: dict[Pool, Vectors] = {}

    def pool_layer(layer: int, states_BTD: Tensor) -> None:
        if states_BTD.shape[:2] != text_BT.shape:
            raise ModelError(
                f"{backbone.base_name}: layer {layer} has states of shape {tuple(states_BTD.shape)}, expected "
                f"{tuple(text_BT.shape)} and the width; set embeddings.backbone.layer = {layer_count(backbone)}"
            )
        found.update({p: _pool(states_BTD, text_BT.to(states_BTD.device), p.pooling) for p in pools if p.layer == layer})

    last = layer_count(backbone)
    inner = {pool.layer for pool in pools if pool.layer < last}
    deepest = max(pool.layer for pool in pools)
    # Later layers are left out only if there is a list of layers, as for reading an inner one.
    depth = deepest if deepest < last else None
    with _reading(backbone.model, inner, pool_layer), first_layers(backbone.model, depth):
        states_BTD = backbone.hidden(ids_BT, mask_BT)
    if deepest == last:
        pool_layer(last, states_BTD)
    return found


@contextmanager
def _reading(model: Any, layers: set[int], read: Any) -> Iterator[None]:
    """Call `read` with the number and the output of each of these layers inside the block."""

    def hook(layer: int) -> Any:
        return lambda module, inputs, output: read(layer, output[0] if isinstance(output, tuple) else output)

    modules: Mapping[int, nn.Module] = dict(enumerate(decoder_layers(model), 1)) if layers else {}
    handles = [modules[layer].register_forward_hook(hook(layer)) for layer in sorted(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pool(states_BTD: Tensor, text_BT: Tensor, pooling: Pooling) -> Vectors:
    units_BTD = nn.functional.normalize(states_BTD.float(), dim=-1)
    if pooling == "last":
        positions_T = torch.arange(text_BT.shape[1], device=text_BT.device)
        last_B = (text_BT * positions_T).argmax(-1)
        pooled_BD = units_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
    else:
        pooled_BD = (units_BTD * text_BT[..., None]).sum(1) / text_BT.sum(-1, keepdim=True)
    vectors: Vectors = pooled_BD.cpu().numpy()
    return vectors
