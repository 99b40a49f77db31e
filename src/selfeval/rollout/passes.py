"""Forward passes of the engine, each with its own cache: over whole prompts, and over one new token per row.

Shapes: B rows, T tokens so far, V vocabulary, N roles per pass (the acting role first).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from selfeval.backbone.families.cache import (
    append_rows,
    drop_last,
    preallocated_cache,
    resize_columns,
    select_rows,
    state_arguments,
)
from selfeval.backbone.roles import Backbone
from selfeval.errors import RoleError
from selfeval.prompt import Prompt

__all__ = ["Pass", "left_padded", "passes"]


class Pass:
    """One forward pass over one or more roles, whose rows are concatenated role by role, and its cache.

    Args:
        backbone: backbone with an acting role.
        guides: roles of the guide, each with separate rows.
        own: whether the acting role has rows in this pass.
        room: number of tokens to reserve in the cache beyond the prompt.
        rows, width: Optional. If rows are added by `join`: the most at a time, and the tokens of the longest prompt.
    """

    def __init__(
        self, backbone: Backbone, guides: Sequence[str], own: bool, room: int, rows: int | None = None, width: int = 0
    ) -> None:
        if backbone.acting is None:
            raise RoleError("sampling outside of `with backbone.acting_as(role)`; select a role first")
        self.backbone, self.own = backbone, own
        self.roles = (*((backbone.acting,) if own else ()), *guides)
        self.cache = preallocated_cache(backbone.model.config, room, rows, width)
        self.step = backbone.decode_step()

    def refresh(self) -> None:
        """Follow a change of the model's roles, which may have replaced modules."""
        self.step = self.backbone.decode_step()

    def logits(self, ids_BT: Tensor, attention_BT: Tensor, last: int = 1) -> Tensor:
        """Compute logits `[roles, B, last, V]` after each of the last ones of these tokens.

        Args:
            ids_BT: the new tokens.
            attention_BT: 1 at real tokens, for those in the cache and the new ones.
            last: number of tokens whose logits are returned. Default: 1.
        """
        count = len(self.roles)
        ids, attention = ids_BT.repeat(count, 1), attention_BT.repeat(count, 1)
        with self._acting(len(ids_BT)):
            # The model's own pass reads whole prompts, with their padding, and drafts on a GPU, where the step was not tested
            # on several tokens.
            if self.step is not None and ids.shape[1] == last and (last == 1 or ids.device.type == "cpu"):
                logits = self.step.logits(ids, attention, self.cache)
            else:
                logits = self._model_logits(ids, attention, self.cache, last)
        return logits.float().view(count, len(ids_BT), last, -1)

    def join(self, prompts: Sequence[Prompt], owners: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """Add a row for each owner to the cache; return next-token logits `[1, rows, V]` and attention mask `[rows, width]`.

        Args:
            prompts: distinct prompts, read in one pass of their own.
            owners: for each new row, the index of its prompt.
            width: columns of the cache.
        """
        device = self.backbone.loaded.device
        ids, attention = left_padded(prompts, self.backbone.loaded.pad_id, device)
        own = preallocated_cache(self.backbone.model.config, 0)
        with self._acting(len(ids)):
            logits = self._model_logits(ids, attention, own)[:, -1].float()
        append_rows(self.cache, own, owners, device)
        rows = torch.tensor(owners, device=device)
        attention = nn.functional.pad(attention, (width - ids.shape[1], 0))
        return logits[None, rows], attention[rows]

    def resize(self, columns: int) -> None:
        """Drop columns at the front of the cache that are padding in every row, or add such columns."""
        resize_columns(self.cache, columns)

    def take_back(self, columns: int) -> None:
        """Drop the last columns of the cache, of tokens that are no part of the reply."""
        drop_last(self.cache, columns)

    def _model_logits(self, ids: Tensor, attention: Tensor, cache: Any, last: int = 1) -> Tensor:
        """Compute them in the model's own pass, which adds its keys and values to a cache, `[rows, last, V]`."""
        loaded = self.backbone.loaded
        arguments: dict[str, Any] = {"input_ids": ids, **state_arguments(loaded, cache, attention, ids.shape[1])}
        if loaded.forward_accepts("position_ids"):
            # Count real tokens only, because left padding must not shift the positions. Padding gets 0 and is masked.
            positions = (attention.cumsum(-1) - 1).clamp_min(0)
            arguments["position_ids"] = positions[:, -ids.shape[1] :]
        if loaded.forward_accepts("logits_to_keep"):
            # An index instead of a count: a view of the last position is not contiguous, and a bf16 matmul on a CPU would then
            # copy the output layer once per row.
            arguments["logits_to_keep"] = torch.arange(ids.shape[1] - last, ids.shape[1], device=ids.device)
        logits: Tensor = self.backbone.model(**arguments, use_cache=True).logits
        return logits[:, -last:]

    def _acting(self, rows: int) -> AbstractContextManager[None]:
        # The caller's block already acts for a pass of the acting role alone. Otherwise name one role per row, or a single
        # role where there is only one: fused experts refuse roles per row.
        if self.own and len(self.roles) == 1:
            return nullcontext()
        return self.backbone.acting_as([role for role in self.roles for _ in range(rows)] if self.roles[1:] else self.roles[0])

    def select(self, rows: Sequence[int], of: int) -> None:
        """Keep (or repeat) these rows out of the `of` rows of each role."""
        # Row r of the k-th role is at index k * of + r.
        select_rows(self.cache, [k * of + row for k in range(len(self.roles)) for row in rows], self.backbone.loaded.device)


def passes(backbone: Backbone, guides: Sequence[str], room: int) -> list[Pass]:
    """Create the passes over the acting role and the guides: a single one, or one per role if roles cannot share a pass."""
    if backbone.mixes_rows:
        return [Pass(backbone, guides, True, room)]
    return [Pass(backbone, (), True, room), *(Pass(backbone, (role,), False, room) for role in guides)]


def left_padded(prompts: Sequence[Prompt], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask `[B, T]` of prompts, whose last tokens share the last column."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=device)
    return ids, attention
