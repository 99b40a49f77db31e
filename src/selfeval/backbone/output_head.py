"""The frozen output layer: hidden states to logits, whole or a slice of the vocabulary at a time, and gradients back.

Shapes: N tokens, D hidden, V vocabulary, S a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfeval.backbone.families.logits import logit_cap, logit_scale
from selfeval.backbone.new_rows import HeadRows

__all__ = ["OutputHead"]


@dataclass(frozen=True)
class OutputHead:
    """A model's output layer with what its family does to the result: y = scale * module(h), then cap * tanh(y / cap).

    Attributes:
        module: the layer; its weights are frozen.
        vocabulary: its outputs.
        scale: factor of the family, 1 for most.
        cap: bound of the soft cap (Gemma 2), None for most.
        device: optional device type to compute for. Default: that of the hidden states; the planner sets that of the device
            that it plans for.
        rows_added: optional rows that the acting role adds to those of new tokens.
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None
    device: str | None = None
    rows_added: HeadRows | None = None

    @classmethod
    def of(cls, model: Any, rows: HeadRows | None = None) -> OutputHead:
        """The output layer of a Hugging Face model, with the rows that a role adds."""
        module = model.get_output_embeddings()
        vocabulary = getattr(module, "out_features", None) or model.config.get_text_config().vocab_size
        return cls(module, int(vocabulary), logit_scale(model.config), logit_cap(model.config), rows_added=rows)

    @property
    def can_be_sliced(self) -> bool:
        """Whether `weight` may be read: a plain layer, here, in full; not a quantised, offloaded or hooked one."""
        # Exactly nn.Linear: bitsandbytes' layers are subclasses with packed weights. A hook of accelerate means that the weight
        # may not be in memory between passes.
        if type(self.module) is not nn.Linear or hasattr(self.module, "_hf_hook"):
            return False
        hooked = self.module._forward_hooks or self.module._forward_pre_hooks
        # On the meta device are weights that are elsewhere for now, and all those of the planner, which sets `device`.
        here = self.device is not None or not self.module.weight.is_meta
        return not hooked and self.module.weight.is_floating_point() and here

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, fp32, of hidden states `[..., D]` -> `[..., V]`."""
        raw: Tensor = self.module(self._as_taken(hidden)).float()
        if self.rows_added is not None:
            raw = self._with_rows(raw, hidden, slice(0, self.vocabulary), self.rows_added)
        logits = raw * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def _as_taken(self, hidden: Tensor) -> Tensor:
        """Hidden states in the layer's precision: some families end in fp32 on a half-precision layer."""
        weight = getattr(self.module, "weight", None)
        return hidden.to(weight.dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else hidden

    def finish_(self, raw: Tensor) -> Tensor:
        """The family's scale and cap on what the layer gave, in fp32 and in place where `raw` is fp32."""
        logits = raw.float()
        logits = logits if self.scale == 1.0 else logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the gradient factor of the cap, computed from the capped logits: 1 - (y / cap)^2; None without a cap."""
        return None if self.cap is None else logits.div(self.cap).square_().neg_().add_(1.0)

    def part(self, hidden_ND: Tensor, columns: slice, *, pull: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The layer's raw outputs for some columns `[N, S]`, and the map from gradients of these to those of the hidden states.

        Args:
            hidden_ND: hidden states.
            columns: of the vocabulary; all of it unless the head can be sliced.
            pull: whether the map will be called.
        """
        raw, pulled = self._base_part(hidden_ND, columns, pull=pull)
        if (rows := self.rows_added) is None:
            return raw, pulled
        where, weight_SD = rows.within(columns)
        if not len(weight_SD):
            return raw, pulled

        def pulled_with_rows(gradient_NS: Tensor) -> Tensor:
            base_ND = pulled(gradient_NS)
            return base_ND + (gradient_NS[:, where].float() @ weight_SD.detach()).to(base_ND)

        return self._with_rows(raw, hidden_ND, columns, rows), pulled_with_rows

    def _with_rows(self, raw: Tensor, hidden: Tensor, columns: slice, rows: HeadRows) -> Tensor:
        """Add the logits of a role's rows, in fp32, to raw outputs `[..., S]` for some columns."""
        where, weight = rows.within(columns)
        added = hidden.to(weight.device).float() @ weight.T
        padded = nn.functional.pad(added, (where.start, raw.shape[-1] - where.stop))
        return (raw.float() + padded.to(raw.device)).to(raw.dtype)

    def _base_part(self, hidden_ND: Tensor, columns: slice, *, pull: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the outputs of the frozen layer for `part`."""
        if self.can_be_sliced:
            weight, bias = self.module.weight[columns], self.module.bias  # type: ignore[index]
            raw = nn.functional.linear(self._as_taken(hidden_ND), weight, None if bias is None else bias[columns])  # type: ignore[index]
            return raw, lambda gradient_NS: gradient_NS.to(weight.dtype) @ weight
        # Any other layer is a black box: autograd computes its gradients.
        with torch.set_grad_enabled(pull):
            leaf = hidden_ND.detach().requires_grad_(pull)
            through = self.module(self._as_taken(leaf))

        def pulled(gradient_NS: Tensor) -> Tensor:
            # The graph is kept, because there is one call per differentiated output.
            return torch.autograd.grad(through, leaf, gradient_NS.to(through), retain_graph=True)[0]

        # A copy, because `finish_` changes it in place.
        return through.detach().to(hidden_ND.device, copy=True), pulled

    def rows(self, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """The weights of one token per row, `[N, D]`: the gradient of its raw logit."""
        base_ND = self._base_rows(hidden_ND, tokens_N)
        if self.rows_added is None:
            return base_ND
        return base_ND.float() + self.rows_added.of(tokens_N.to(self.rows_added.weight.device)).to(base_ND.device)

    def _base_rows(self, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
        if self.can_be_sliced:
            return self.module.weight[tokens_N]  # type: ignore[index]
        # The gradient of a one-hot vector of logits is a row of the weights.
        raw, pull = self._base_part(hidden_ND, slice(0, self.vocabulary), pull=True)
        return pull(torch.zeros_like(raw).scatter_(1, tokens_N[:, None], 1.0))
