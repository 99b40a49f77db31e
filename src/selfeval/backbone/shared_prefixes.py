"""Batches whose prompts are read once: all replies to a prompt share its pass (Prefix Grouper, Liu et al. 2025,
https://arxiv.org/abs/2506.05433).

The tokens of a batch are put into one row, each distinct prompt once, then the replies: P + G R tokens for a prompt with G
replies in place of G (P + R), and no padding. Positions continue from the prompt in each of its replies. Everything but
attention treats tokens independently; attention is computed in two parts, prompts to themselves, and replies to their prompt
and themselves. Outputs and gradients are those of separate rows, up to rounding.

`shares_prefixes` measures whether a model can do this: families with a recurrent state, with positions that attention adds by
itself, or with an attention kernel other than SDPA read separate rows.

Shapes: G distinct prompts, P tokens of the longest, B replies, R tokens of the longest, N tokens of the row, H heads, D hidden.
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from selfeval.backbone.adapters import BASE
from selfeval.backbone.body import text_body
from selfeval.backbone.families.cache import has_running_state
from selfeval.backbone.load import LoadedModel
from selfeval.errors import is_out_of_memory

__all__ = [
    "FAILURES",
    "LayoutBlock",
    "Passes",
    "PrefixLayout",
    "agrees_with_separate_rows",
    "longest_span",
    "may_share",
    "prefix_layout",
    "recomputation",
    "uniform_layout",
]

_IMPLEMENTATION = "selfeval_shared_prefixes"
"""Name of the attention function in transformers."""


@dataclass(frozen=True)
class PrefixLayout:
    """The tokens of a batch in one row: distinct prompts, then replies.

    Attributes:
        ids_1N, positions_1N: token ids, and their positions in prompt and reply.
        prompts_GP, replies_BR: index of each token in the row; padding has the index of some token.
        owners_B: index of the prompt of each reply.
        mask_B1RK: whether a reply's token attends to a token of its prompt or reply, K = P + R.
        from_parts_N: index of each token of the row among the padded prompts and replies.
        before_BR: index of the token whose state predicts each reply token.
    """

    ids_1N: Tensor
    positions_1N: Tensor
    prompts_GP: Tensor
    replies_BR: Tensor
    owners_B: Tensor
    mask_B1RK: Tensor
    from_parts_N: Tensor
    before_BR: Tensor


def prefix_layout(
    ids_BT: Tensor, prompt_lengths_B: Tensor, reply_BR: Tensor, reply_lengths_B: Tensor, owners_B: Tensor
) -> PrefixLayout:
    """Put a batch into one row.

    Args:
        ids_BT: right-padded prompts with their replies.
        prompt_lengths_B: tokens of the prompts, each at least 1.
        reply_BR: the replies, right-padded.
        reply_lengths_B: tokens of each reply to read; the rest counts as padding.
        owners_B: a number per reply; replies with equal numbers have equal prompts.

    Example:
        >>> ids, replies = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]]), torch.tensor([[7, 8], [9, 0]])
        >>> layout = prefix_layout(ids, torch.tensor([2, 2]), replies, torch.tensor([2, 1]), torch.tensor([0, 0]))
        >>> layout.ids_1N.tolist(), layout.positions_1N.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]])
    """
    device = ids_BT.device
    _, owners_B = owners_B.unique(return_inverse=True)
    groups = int(owners_B.max()) + 1
    # One reply of each prompt; which one does not matter.
    rows_G = torch.empty(groups, dtype=torch.long, device=device).scatter_(
        0, owners_B, torch.arange(len(owners_B), device=device)
    )
    lengths_G = prompt_lengths_B[rows_G]
    in_prompt_GP = torch.arange(int(lengths_G.max()), device=device) < lengths_G[:, None]
    in_reply_BR = torch.arange(int(reply_lengths_B.max()), device=device) < reply_lengths_B[:, None]
    width, longest = in_prompt_GP.shape[1], in_reply_BR.shape[1]
    offsets_P, offsets_R = torch.arange(width, device=device), torch.arange(longest, device=device)
    positions_BR = lengths_G[owners_B, None] + offsets_R
    prompt_tokens = int(lengths_G.sum())
    replies_BR = prompt_tokens + _count(in_reply_BR)
    prompts_GP = _count(in_prompt_GP)
    last_B1 = prompts_GP[torch.arange(groups, device=device), lengths_G - 1][owners_B, None]
    causal_RR = offsets_R[:, None] >= offsets_R
    prompt_B1P = in_prompt_GP[owners_B][:, None]
    mask_BRK = torch.cat([prompt_B1P.expand(-1, longest, -1), causal_RR.expand(len(owners_B), -1, -1)], dim=-1)
    # The state at a token predicts the next one, so the first reply token is predicted at the end of the prompt.
    before_BR = torch.cat([last_B1, replies_BR], dim=1)[:, : reply_BR.shape[1]]
    return PrefixLayout(
        ids_1N=torch.cat([ids_BT[rows_G, :width][in_prompt_GP], reply_BR[:, :longest][in_reply_BR]])[None],
        positions_1N=torch.cat([offsets_P.expand(groups, -1)[in_prompt_GP], positions_BR[in_reply_BR]])[None],
        prompts_GP=prompts_GP,
        replies_BR=replies_BR,
        owners_B=owners_B,
        mask_B1RK=mask_BRK[:, None],
        from_parts_N=torch.cat([_places(in_prompt_GP), in_prompt_GP.numel() + _places(in_reply_BR)]),
        before_BR=nn.functional.pad(before_BR, (0, reply_BR.shape[1] - before_BR.shape[1])),
    )


def uniform_layout(prompts: int, replies: int, prompt: int, reply: int) -> PrefixLayout:
    """Return a layout of texts of equal lengths, for passes on shapes: its ids and indices are 0.

    Args:
        prompts, replies: number of distinct prompts and of replies.
        prompt, reply: tokens of each.
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.long)

    tokens = prompts * prompt + replies * reply
    mask_B1RK = torch.ones(replies, 1, reply, prompt + reply, dtype=torch.bool)
    return PrefixLayout(
        ids_1N=zeros(1, tokens),
        positions_1N=zeros(1, tokens),
        prompts_GP=zeros(prompts, prompt),
        replies_BR=zeros(replies, reply),
        owners_B=zeros(replies),
        mask_B1RK=mask_B1RK,
        from_parts_N=zeros(tokens),
        before_BR=zeros(replies, reply + 1),
    )


def _count(mask: Tensor) -> Tensor:
    """Number the true entries in their order; false ones have the number of the one before, or 0."""
    return (mask.flatten().long().cumsum(0) - 1).clamp_min(0).view(mask.shape)


def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0]


class LayoutBlock(AbstractContextManager[None]):
    """Make the attention of a model read a layout inside the block.

    It can be entered again, as the recomputation of a layer in the backward pass does.

    Args:
        model: a model whose attention is SDPA.
        layout: the tokens of the passes inside.

    Attributes:
        calls: number of times that attention read the layout.
    """

    def __init__(self, model: Any, layout: PrefixLayout) -> None:
        self._config = _text_config(model)
        self.layout, self.calls = layout, 0
        self._copies = {layout.ids_1N.device: layout}

    def on(self, device: torch.device) -> PrefixLayout:
        """Return the layout on a device that holds some of the layers."""
        if device not in self._copies:
            tensors = (getattr(self.layout, field.name) for field in fields(self.layout))
            self._copies[device] = PrefixLayout(*(tensor.to(device) for tensor in tensors))
        return self._copies[device]

    def __enter__(self) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)
        self._outer = self._config._attn_implementation
        self._config._attn_implementation = _IMPLEMENTATION
        _blocks().append(self)

    def __exit__(self, *error: object) -> None:
        _blocks().pop()
        self._config._attn_implementation = self._outer


def _text_config(model: Any) -> Any:
    """Return the config that attention reads, which is a part of the config of a model for images and text."""
    config: Any = text_body(model).config
    return config.get_text_config()


_LOCAL = threading.local()


def _blocks() -> list[LayoutBlock]:
    """Return the open blocks of this thread, innermost last; a backward pass may run in another one."""
    if not hasattr(_LOCAL, "blocks"):
        _LOCAL.blocks = []
    found: list[LayoutBlock] = _LOCAL.blocks
    return found


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention of transformers' interface over a layout: `[1, H, N, D]` to `[1, N, H, D]`."""
    block = _blocks()[-1]
    layout, block.calls = block.on(query.device), block.calls + 1
    if options.get("position_bias") is not None:
        raise ValueError("a position bias cannot be computed for a layout")
    # Prompts: causal attention, one row per prompt.
    queries_GHPD, keys_GHPD, values_GHPD = (_parts(states, layout.prompts_GP) for states in (query, key, value))
    prompts_GPHD, _ = sdpa_attention_forward(module, queries_GHPD, keys_GHPD, values_GHPD, None, **options)
    if not layout.replies_BR.shape[1]:
        return prompts_GPHD.flatten(0, 1).index_select(0, layout.from_parts_N)[None], None
    # Replies: to their prompt and to themselves.
    queries_BHRD = _parts(query, layout.replies_BR)
    keys_BHKD, values_BHKD = (
        torch.cat([prompts.index_select(0, layout.owners_B), _parts(states, layout.replies_BR)], dim=2)
        for prompts, states in ((keys_GHPD, key), (values_GHPD, value))
    )
    replies_BRHD, _ = sdpa_attention_forward(module, queries_BHRD, keys_BHKD, values_BHKD, layout.mask_B1RK, **options)
    parts = torch.cat([prompts_GPHD.flatten(0, 1), replies_BRHD.flatten(0, 1)])
    return parts.index_select(0, layout.from_parts_N)[None], None


def _parts(states_1HND: Tensor, index: Tensor) -> Tensor:
    """Return the states at `[B, T]` indices of the row as `[B, H, T, D]`."""
    picked = states_1HND[0].transpose(0, 1).index_select(0, index.flatten())
    return picked.view(*index.shape, *picked.shape[1:]).transpose(1, 2)


def recomputation(
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]], model: Any
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Let the recomputation of a layer in the backward pass read the layout that is open now.

    Args:
        contexts: of the forward pass and of the recomputation.
        model: whose layer it is.
    """
    forward, again = contexts
    return (forward, _Both(LayoutBlock(model, _blocks()[-1].layout), again)) if _blocks() else contexts


class _Both(AbstractContextManager[None]):
    """Two contexts that can be entered again."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""Errors of passes over a layout in models that cannot read one."""


def may_share(loaded: LoadedModel) -> bool:
    """Return whether nothing rules layouts out before a pass.

    Attention must be SDPA and read given positions, and no layer may have a running state. Llama 4 scales attention by the
    place of a token in its row.
    """
    config = _text_config(loaded.model)
    reads_positions = loaded.forward_accepts("position_ids") and not getattr(config, "attn_temperature_tuning", False)
    return reads_positions and config._attn_implementation == "sdpa" and not has_running_state(config)


class Passes(Protocol):
    """Interface required of a backbone."""

    loaded: LoadedModel

    def acting_as(self, role: str) -> AbstractContextManager[None]: ...

    def hidden(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor: ...

    def layout_hidden(self, layout: PrefixLayout) -> Tensor: ...


_PROMPTS, _REPLIES, _OWNERS = ((0, 1, 2), (2, 3)), ((1, 0), (3,), (2, 1), (0,)), (0, 0, 1, 1)
"""Texts of the measurement, and the prompt of each reply, within every vocabulary and context."""


@torch.no_grad()
def agrees_with_separate_rows(backbone: Passes) -> bool:
    """Return whether the states of a layout equal those of separate rows, measured on two prompts with two replies each.

    They must be equal up to 1/1000 of the difference that reading the layout as a single text makes, or 1/10 in less than 32
    bits, where the two passes round differently.
    """
    device = backbone.loaded.device
    if not may_share(backbone.loaded):
        return False
    rows = [[*_PROMPTS[owner], *reply] for owner, reply in zip(_OWNERS, _REPLIES, strict=True)]
    ids_BT, attention_BT, replies_BR = (
        pad_sequence([torch.tensor(row) for row in texts], batch_first=True).to(device)
        for texts in (rows, [[1] * len(row) for row in rows], _REPLIES)
    )
    prompt_lengths, lengths, owners = (
        torch.tensor(values, device=device)
        for values in ([len(_PROMPTS[owner]) for owner in _OWNERS], [len(reply) for reply in _REPLIES], _OWNERS)
    )
    layout = prefix_layout(ids_BT, prompt_lengths, replies_BR, lengths, owners)
    with backbone.acting_as(BASE):
        try:
            states_ND = backbone.layout_hidden(layout)
            separate_BTD = backbone.hidden(ids_BT, attention_BT)
            leaking_ND = backbone.hidden(layout.ids_1N, torch.ones_like(layout.ids_1N))[0]
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            return False
    if states_ND.shape != leaking_ND.shape:
        return False
    expected = torch.cat([states[n : n + r] for states, n, r in zip(separate_BTD, prompt_lengths, lengths, strict=True)])
    places = torch.cat([row[:r] for row, r in zip(layout.replies_BR, lengths, strict=True)])
    difference, leak = ((states.index_select(0, places) - expected).float().abs().mean() for states in (states_ND, leaking_ND))
    return bool(difference <= leak * (1e-3 if expected.dtype == torch.float32 else 0.1))


def longest_span(model: Any) -> int:
    """Return the longest sequence in which each token attends to all before it; sliding windows and chunks are shorter."""
    config = _text_config(model)
    spans = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((int(span) for span in spans if span), default=sys.maxsize)
