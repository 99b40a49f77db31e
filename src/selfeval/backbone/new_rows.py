"""Trained rows of new tokens: what a role adds to the frozen rows of the embedding and of the output layer.

    e_t = W_t + d_t,   z_v = (U_v + u_v) h,   with d and u 0 for all but the new tokens

LoRA trains no embedding, so tokens without a history would keep the values that they began with. The base stays frozen; d and u
belong to the role, in fp32, and begin at 0. If the base ties its output layer to its embedding, u is d.

Shapes: B rows, T tokens, E new tokens, D width, S columns of the vocabulary, N tokens of a pass.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HeadRows", "NewRows"]


@dataclass(frozen=True)
class HeadRows:
    """Rows that are added to those of the output layer.

    Attributes:
        first: token of the first row.
        weight: the rows `[E, D]`, fp32.
    """

    first: int
    weight: Tensor

    @property
    def stop(self) -> int:
        return self.first + len(self.weight)

    def within(self, columns: slice) -> tuple[slice, Tensor]:
        """Return the columns of a slice that have rows, counted from its start, and these rows; both may be empty."""
        start, stop = max(columns.start, self.first), min(columns.stop, self.stop)
        if start >= stop:
            return slice(0, 0), self.weight[:0]
        return slice(start - columns.start, stop - columns.start), self.weight[start - self.first : stop - self.first]

    def of(self, tokens_N: Tensor) -> Tensor:
        """Return the rows of tokens, `[N, D]`: 0 for those that are not new."""
        index_N, is_new_N = _index(tokens_N, self.first, len(self.weight))
        return self.weight[index_N] * is_new_N[:, None]


@dataclass(frozen=True)
class NewRows:
    """The trained rows of a role.

    Attributes:
        first: the first new token.
        input: rows `[E, D]` added to the embedding.
        output: rows added to the output layer; None if it is tied to the embedding.
    """

    first: int
    input: nn.Parameter
    output: nn.Parameter | None

    @classmethod
    def of(cls, model: Any, first: int, count: int, device: torch.device) -> NewRows:
        """Return rows of zeros for tokens of a model.

        Args:
            model: Hugging Face model.
            first: the first new token.
            count: number of new tokens.
            device: device of the rows if those of the model are not in memory between passes.

        Raises:
            ValueError: the model has no rows for them.
        """
        embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
        if not 0 < count <= len(embedding.weight) - first:
            raise ValueError(
                f"tokens {first} to {first + count - 1} are not among the {len(embedding.weight)} rows of the model"
            )
        is_tied = output is None or output.weight is embedding.weight
        rows = _zeros(embedding.weight, count, device)
        return cls(first, rows, None if is_tied else _zeros(output.weight, count, device))

    @property
    def head(self) -> HeadRows:
        """The rows of the output layer."""
        return HeadRows(self.first, self.input if self.output is None else self.output)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained weights by name."""
        return {"rows.input": self.input} | ({} if self.output is None else {"rows.output": self.output})

    def embedded(self, embedding: nn.Module, ids_BT: Tensor) -> Tensor:
        """Return what the rows add to the output `[B, T, D]` of the embedding.

        Args:
            embedding: input embedding of the base, whose scale is applied (Gemma).
            ids_BT: token ids.
        """
        index_BT, is_new_BT = _index(ids_BT.to(self.input.device), self.first, len(self.input))
        # The same class on these rows only, without the hooks of the base.
        bare: Any = copy.copy(embedding)
        bare._parameters, bare.padding_idx = {"weight": self.input}, None
        found: Tensor = type(embedding).forward(bare, index_BT)
        return found * is_new_BT[..., None]


def _index(tokens: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the row of each token, 0 for those without one, and whether it has one."""
    index = tokens - first
    is_new = (index >= 0) & (index < count)
    return index.where(is_new, torch.zeros_like(index)), is_new


def _zeros(weight: Tensor, count: int, device: torch.device) -> nn.Parameter:
    place = device if weight.is_meta else weight.device
    return nn.Parameter(torch.zeros(count, weight.shape[1], device=place, dtype=torch.float32))
