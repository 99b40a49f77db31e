"""Rows that hold several documents, which do not attend to one another.

Where a model's attention allows it, one pass reads several documents per row: positions restart at each document, and
transformers derives a block-diagonal attention mask from them (`transformers.masking_utils`). Families without position ids,
with a recurrent state, or with an attention kernel that ignores the mask cannot do this, and transformers does not report it.
`reads_packed_rows` therefore measures it.

Shapes: B rows, T tokens of a row, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfeval.backbone.adapters import BASE
from selfeval.backbone.roles import Backbone
from selfeval.errors import is_out_of_memory

__all__ = ["PaddedRows", "pad_rows", "reads_packed_rows", "rows_hidden"]

_FIRST, _SECOND = (0, 1, 2, 3, 0), (2, 3, 1, 0, 2, 1, 3)
"""Documents of the measurement. Every vocabulary has these ids."""


@dataclass(frozen=True)
class PaddedRows:
    """Right-padded rows of documents.

    Attributes:
        ids_BT: token ids.
        attention_BT: 1 at real tokens.
        positions_BT: position of each token within its document. Padding is a separate document.
        packed: whether a row has several documents.
    """

    ids_BT: Tensor
    attention_BT: Tensor
    positions_BT: Tensor
    packed: bool


def pad_rows(rows: Sequence[Sequence[Sequence[int]]], pad: int, device: torch.device | str) -> PaddedRows:
    """Batch rows of documents.

    Args:
        rows: for each row, the token ids of its documents.
        pad: id of the padding token.
        device: device of the tensors.

    Example:
        >>> pad_rows([[[7, 8], [9]], [[7]]], pad=0, device="cpu").positions_BT
        tensor([[0, 1, 0],
                [0, 0, 1]])
    """
    lengths = [sum(map(len, row)) for row in rows]
    width = max(lengths)
    ids = [[*(i for document in row for i in document), *[pad] * (width - n)] for row, n in zip(rows, lengths, strict=True)]
    positions = [
        [*(i for document in row for i in range(len(document))), *range(width - n)]
        for row, n in zip(rows, lengths, strict=True)
    ]
    return PaddedRows(
        ids_BT=torch.tensor(ids, device=device),
        attention_BT=torch.tensor([[1] * n + [0] * (width - n) for n in lengths], device=device),
        positions_BT=torch.tensor(positions, device=device),
        packed=any(len(row) > 1 for row in rows),
    )


def rows_hidden(backbone: Backbone, rows: PaddedRows) -> Tensor:
    """Compute the last hidden states `[B, T, D]` of rows under the acting role.

    Rows of several documents require `reads_packed_rows(backbone)`.
    """
    if rows.packed:
        return backbone.packed_hidden(rows.ids_BT, rows.positions_BT)
    return backbone.hidden(rows.ids_BT, rows.attention_BT)


@torch.no_grad()
def reads_packed_rows(backbone: Backbone) -> bool:
    """Return whether documents in one row of this model do not see each other, measured on two short documents.

    The hidden states of packed documents must equal those of each document alone: up to 1/1000 of the difference that
    concatenation without a mask makes, or 1/10 in less than 32 bits, where the two passes round differently.
    """
    if not backbone.loaded.forward_accepts("position_ids"):
        return False
    device, pad = backbone.loaded.device, backbone.loaded.pad_id
    # Two rows, because some kernels handle a single packed row only.
    packed = pad_rows([[_FIRST, _SECOND], [_SECOND, _FIRST]], pad, device)
    with backbone.acting_as(BASE):
        first, second = (backbone.hidden(*_alone(document, device))[0] for document in (_FIRST, _SECOND))
        alone = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
        try:
            found = rows_hidden(backbone, packed)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return False
        leaking = backbone.hidden(packed.ids_BT, packed.attention_BT)
    if found.shape != alone.shape:
        return False
    difference, leak = ((states - alone).float().abs().mean().item() for states in (found, leaking))
    return difference <= leak * (1e-3 if alone.dtype == torch.float32 else 0.1)


def _alone(document: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([list(document)], device=device)
    return ids, torch.ones_like(ids)
