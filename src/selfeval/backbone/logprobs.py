"""Log-probs, entropies and exact KL of tokens from hidden states, without ever holding their logits.

With y the model's logits (family scale and cap included), T the temperature and p = softmax(y / T), for each token:

    log-prob   log p(target)
    entropy    H  = -sum_v p_v log p_v
    KL         KL = sum_v p_v (log p_v - log q_v), q from another role's hidden states

The logits are made a tile at a time (some rows, a slice of the vocabulary) and summed up as they come, with a running maximum
(Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). The head is frozen, so that the only gradient is that of the
hidden states h, and each output has one vector per token, with W_v the head's rows and s_v = dy_v / d raw_v / T:

    d log-prob / dh = s_target W_target - sum_v p_v s_v W_v
    d H / dh        = -sum_v p_v (log p_v + H) s_v W_v
    d KL / dh       = sum_v p_v (log p_v - log q_v - KL) s_v W_v

These are summed in the forward, over the same tiles: the backward only multiplies them by what comes from above, and the head
is multiplied twice for one output, as in the plain version (recomputing the logits would make it three). The tensors
saved for the backward pass are `[N, D]` per differentiated output, in the precision of the hidden states.

Rows of new tokens that the acting role trains (`new_rows`) get their gradient in the backward pass, from their logits computed
again: sum over tokens of g (1[v = target] - p_v) s_v h for the row of v, with the gradient g of the log-prob.

Shapes: B sequences, R reply tokens, N tokens that count, C tokens of a chunk, D hidden, V vocabulary, S a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfeval.backbone.output_head import OutputHead

__all__ = ["HasOutputHead", "Measure", "TokenLogprobs", "slices", "tile_bytes", "token_logprobs"]

Measure = Literal["logprobs", "entropy", "kl"]

_ONLY_LOGPROBS: tuple[Measure, ...] = ("logprobs",)

_MIB = 1 << 20
_ROWS = 512
_LOWEST = -1e30
"""Start of a running maximum: finite, because inf - inf is NaN."""


class HasOutputHead(Protocol):
    """Interface required of a backbone."""

    @property
    def output_head(self) -> OutputHead: ...


class TokenLogprobs(NamedTuple):
    """Results of `token_logprobs`, each `[B, R]` in fp32 and nats, 0 where the mask is False.

    Attributes:
        logprobs: of the tokens.
        entropy: of the distributions they come from; None unless asked for.
        kl: of those distributions to the other role's; None unless its hidden states were given.
    """

    logprobs: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def token_logprobs(
    backbone: HasOutputHead,
    hidden_BRD: Tensor,
    targets_BR: Tensor,
    mask_BR: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    other_BRD: Tensor | None = None,
    gradient: Collection[Measure] = _ONLY_LOGPROBS,
    chunk_bytes: int | None = None,
) -> TokenLogprobs:
    """Log-probs of tokens and, where asked, the entropies of their distributions and the KL to another role's.

    Formulas at the top of this module. Equal to log-softmax and gather on `backbone.logits`, in value and gradient; sums are
    fp32 whatever the precision of the base. Gradients go to `hidden_BRD` alone: the head is frozen, and the other role is held
    fixed. They cannot be differentiated again.

    Args:
        backbone: whose output layer is used; no role need act.
        hidden_BRD: states that predict each token.
        targets_BR: the tokens.
        mask_BR: true at the tokens that count; the others cost nothing and give 0.
        temperature: t of both distributions, > 0.
        entropy: whether entropies are wanted.
        other_BRD: optional hidden states of another role at the same tokens, to compute KL(this role || other).
        gradient: outputs that will be differentiated (the others come without gradient). Each further one costs one more
            product with the head.
        chunk_bytes: memory for tiles and their temporary copies; by default 64 MiB, and 16 MiB on a CPU, whose caches are
            small. Outputs, what is kept for the backward, and one row of a head that cannot be sliced may come on top.

    Raises:
        ValueError: `gradient` names an output that is not asked for, or another one than log-probs for a role that trains rows
            of new tokens; or a temperature is not above 0.
    """
    asked: tuple[Measure, ...] = ("logprobs", *(("entropy",) if entropy else ()), *(("kl",) if other_BRD is not None else ()))
    if not set(gradient) <= set(asked):
        raise ValueError(
            f"gradients requested for {sorted(gradient)}, but only {sorted(asked)} are computed; request the others as well"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    differentiated = tuple(m for m in asked if m in gradient) if torch.is_grad_enabled() and hidden_BRD.requires_grad else ()
    # Compute only the tokens that count; `padded` puts them back in place.
    rows_N = mask_BR.reshape(-1).nonzero()[:, 0]
    targets_N = targets_BR.reshape(-1)[rows_N]
    head = backbone.output_head
    budget = chunk_bytes or tile_bytes(head.device or hidden_BRD.device.type)
    job = _Job(head, rows_N, targets_N, temperature, asked, differentiated, budget)
    other_MD = None if other_BRD is None else other_BRD.detach().flatten(0, -2)
    new_ED = None if head.rows_added is None else head.rows_added.weight
    if new_ED is not None and set(differentiated) - {"logprobs"}:
        raise ValueError(f"rows of new tokens have gradients of log-probs only, not of {sorted(differentiated)}")
    found = _Differentiated.apply(hidden_BRD.flatten(0, -2), other_MD, new_ED, job)  # type: ignore[no-untyped-call]

    def padded(measure: Measure) -> Tensor | None:
        if measure not in asked:
            return None
        values_N: Tensor = found[asked.index(measure)]
        return values_N.new_zeros(mask_BR.numel()).index_copy(0, rows_N, values_N).view(mask_BR.shape)

    logprobs_BR = padded("logprobs")
    assert logprobs_BR is not None
    return TokenLogprobs(logprobs_BR, padded("entropy"), padded("kl"))


def tile_bytes(kind: str) -> int:
    """Memory for tiles on a kind of device (cpu, cuda) where nothing else is asked for."""
    return (16 if kind == "cpu" else 64) * _MIB


@dataclass(frozen=True)
class _Job:
    """Requested outputs and their rows."""

    head: OutputHead
    rows_N: Tensor
    targets_N: Tensor
    temperature: float
    asked: tuple[Measure, ...]
    differentiated: tuple[Measure, ...]
    budget: int


class _Differentiated(torch.autograd.Function):
    """The outputs of a job; their gradients are made along with them."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, other_MD: Tensor | None, new_ED: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        count, width = len(job.rows_N), hidden_MD.shape[1]
        values = [hidden_MD.new_empty(count, dtype=torch.float32) for _ in job.asked]
        gradients = [hidden_MD.new_empty(count, width) for _ in job.differentiated]
        log_totals_N = None if new_ED is None else hidden_MD.new_empty(count, dtype=torch.float32)
        # Outer loop: chunks of tokens. Inner loop: slices of the vocabulary, which are summed up and not kept.
        chunk, step = _tile(job, hidden_MD)
        on_shapes = hidden_MD.is_meta
        for part in slices(count, chunk, on_shapes=on_shapes):
            rows_C = job.rows_N[part]
            sums = _Sums(job, hidden_MD[rows_C], None if other_MD is None else other_MD[rows_C], job.targets_N[part])
            for columns in slices(job.head.vocabulary, step, on_shapes=on_shapes):
                sums.add(columns)
            for into, found in zip([*values, *gradients], chain(*sums.results()), strict=True):
                into[part] = found
            if log_totals_N is not None:
                log_totals_N[part] = sums.log_total()
        ctx.save_for_backward(job.rows_N, *gradients)
        # Only rows of new tokens need more: the hidden states, which the rest of the graph holds anyway.
        ctx.new = (job, hidden_MD.detach(), log_totals_N) if new_ED is not None and ctx.needs_input_grad[2] else None
        ctx.positions = [job.asked.index(m) for m in job.differentiated]
        ctx.shape = hidden_MD.shape
        # Outputs that the loss does not use come back as None instead of zeros.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for m, v in zip(job.asked, values, strict=True) if m not in job.differentiated))
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None]:
        rows_N, *gradients = ctx.saved_tensors
        total_ND: Tensor | None = None
        for position, gradient_ND in zip(ctx.positions, gradients, strict=True):
            above_N = above[position]
            if above_N is not None:
                # out= keeps the product in the precision of the hidden states; with the fp32 factor it would become fp32.
                part_ND = torch.mul(gradient_ND, above_N[:, None], out=torch.empty_like(gradient_ND))
                total_ND = part_ND if total_ND is None else total_ND.add_(part_ND)
        above_N = None if ctx.new is None else above[ctx.new[0].asked.index("logprobs")]
        new_ED = None if above_N is None else _new_rows_gradient(ctx.new, above_N)
        # If every token counts, rows_N is 0, 1, 2, ... and there is nothing to scatter.
        if total_ND is not None and len(rows_N) != ctx.shape[0]:
            total_ND = total_ND.new_zeros(ctx.shape).index_copy_(0, rows_N, total_ND)
        return total_ND, None, new_ED, None


def _new_rows_gradient(saved: tuple[_Job, Tensor, Tensor], above_N: Tensor) -> Tensor:
    """Return the gradient `[E, D]` of the rows of new tokens, given that of the log-probs."""
    job, hidden_MD, log_totals_N = saved
    head, rows = job.head, job.head.rows_added
    assert rows is not None
    gradient_ED = torch.zeros_like(rows.weight, dtype=torch.float32)
    # Of a layer that cannot be sliced all outputs are computed.
    columns = slice(rows.first, rows.stop) if head.can_be_sliced else slice(0, head.vocabulary)
    where, _ = rows.within(columns)
    # Three temporaries of a chunk in fp32.
    chunk = max(1, min(_tile(job, hidden_MD)[0], job.budget // (12 * len(rows.weight))))
    for part in slices(len(above_N), chunk, on_shapes=hidden_MD.is_meta):
        hidden_CD = hidden_MD[job.rows_N[part]]
        logits_CE = head.finish_(head.part(hidden_CD, columns, pull=False)[0])[:, where]
        slope_CE = head.slope(logits_CE)
        pull_CE = logits_CE.div(job.temperature).sub_(log_totals_N[part, None]).exp_().neg_()
        local_C = job.targets_N[part] - rows.first
        is_new_C = (local_C >= 0) & (local_C < pull_CE.shape[1])
        pull_CE.scatter_add_(1, local_C.where(is_new_C, torch.zeros_like(local_C))[:, None], is_new_C[:, None].float())
        pull_CE.mul_(above_N[part, None] * (head.scale / job.temperature))
        if slope_CE is not None:
            pull_CE.mul_(slope_CE)
        gradient_ED += pull_CE.T.to(gradient_ED.device) @ hidden_CD.to(gradient_ED)
    return gradient_ED


def slices(length: int, step: int, *, on_shapes: bool) -> Iterator[slice]:
    """Consecutive slices of `step`; on shapes, which have no values, the first two and the last.

    All others hold the same memory as the second, and a large vocabulary has hundreds of them.
    """
    starts: Sequence[int] = range(0, length, step)
    if on_shapes and len(starts) > 3:
        starts = (*starts[:2], starts[-1])
    return (slice(start, min(start + step, length)) for start in starts)


def _tile(job: _Job, hidden_MD: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a tile that keep a chunk's sums and a tile's temporaries within the budget."""
    element, width, vocabulary = _bytes_per_logit(job, hidden_MD.dtype), hidden_MD.shape[1], job.head.vocabulary
    row = 4 * width * (4 + 2 * len(job.differentiated))
    if not job.head.can_be_sliced:
        return max(1, job.budget // (element * vocabulary + row)), vocabulary
    # At most half of the budget for the sums of the rows, the rest for the columns of the tile.
    rows = max(1, min(_ROWS, len(job.rows_N), job.budget // (2 * row)))
    return rows, max(1, min(vocabulary, (job.budget - rows * row) // (rows * element)))


def _bytes_per_logit(job: _Job, dtype: torch.dtype) -> int:
    """Of all that lives of one logit at once; counted along `_Sums.add`."""
    fp32 = 2 + ("kl" in job.asked) + (job.head.cap is not None) * (1 + bool(job.differentiated))
    half = 0 if dtype == torch.float32 else 2 + 2 * bool(job.differentiated)
    whole = 0 if job.head.can_be_sliced else 8
    return 4 * fp32 + half + whole


class _Sums:
    """Sums over the vocabulary for the tokens of one chunk, with e_v = exp(z_v - max) and z = y / T:

    `plain` sum e_v x_v and `pulled` sum e_v x_v s_v W_v, x = 1 (named logprobs), z - max (entropy), z - z_other - centre (kl)

    The target is left out of every sum and joined at the end. For a token that the model is sure of, the sum over the others is
    small, and `W_target - sum_v p_v W_v` would be a difference of nearly equal numbers, lost in the rounding of a 16-bit head.
    The centre, near z - z_other of the target, keeps the KL's terms small for the same reason; any value has the same result.
    """

    def __init__(self, job: _Job, hidden_CD: Tensor, other_CD: Tensor | None, targets_C: Tensor) -> None:
        self.job, self.head, self.hidden_CD, self.other_CD = job, job.head, hidden_CD, other_CD
        self.targets_C1 = targets_C[:, None]
        zero = hidden_CD.new_zeros(len(hidden_CD), 1, dtype=torch.float32)
        self.max_C1, self.other_max_C1 = zero + _LOWEST, zero + _LOWEST
        self.other_mass_C1, self.target_z_C1, self.target_other_C1 = zero, zero, zero
        self.target_slope_C1, self.centre_C1 = zero + 1.0, zero
        self.plain: dict[Measure, Tensor] = {measure: zero.clone() for measure in job.asked}
        self.pulled: dict[Measure, Tensor] = {}
        if job.differentiated:
            self.target_weights_CD = job.head.rows(hidden_CD, targets_C).float()
            # Needed for every gradient: each subtracts a multiple of sum_v p_v s_v W_v.
            self.pulled["logprobs"] = torch.zeros_like(self.target_weights_CD)
            self.pulled |= {measure: torch.zeros_like(self.target_weights_CD) for measure in job.differentiated}
        if "kl" in self.pulled:
            self.centre_C1 = self._near_target(hidden_CD) - self._near_target(other_CD)

    def _near_target(self, hidden_CD: Tensor | None) -> Tensor:
        assert hidden_CD is not None
        raw_C1 = (hidden_CD.float() * self.target_weights_CD).sum(-1, keepdim=True)  # without the bias: near is enough
        return self.head.finish_(raw_C1).div_(self.job.temperature)

    def add(self, columns: slice) -> None:
        """One slice of the vocabulary."""
        # The tile's logits, and the target's logit and slope for those tokens whose target is in this slice.
        y_CS, pull = self._logits(self.hidden_CD, columns, pull=bool(self.pulled))
        local_C1, here_C1 = self._targets_in(columns)
        slope_CS = self.head.slope(y_CS) if self.pulled else None
        if slope_CS is not None:
            self.target_slope_C1 = torch.where(here_C1, slope_CS.gather(1, local_C1), self.target_slope_C1)
        z_CS = y_CS.div_(self.job.temperature) if self.job.temperature != 1.0 else y_CS
        self.target_z_C1 = torch.where(here_C1, z_CS.gather(1, local_C1), self.target_z_C1)
        # Before the maximum is subtracted from z in place.
        apart_CS = self._apart(z_CS, columns) if "kl" in self.plain else None
        self._raise_maximum(z_CS)
        # Overwrite z if only log-probs are asked for.
        e_CS = torch.exp(z_CS.sub_(self.max_C1), out=z_CS if self.plain.keys() == {"logprobs"} else None)
        # Leave the target out of the sums. Rows whose target is in another slice write their value back unchanged.
        e_CS.scatter_(1, local_C1, e_CS.gather(1, local_C1).masked_fill_(here_C1, 0.0))
        # Add this slice to the sums. Without a term, x = 1.
        terms: dict[Measure, Tensor | None] = {"entropy": z_CS, "kl": apart_CS}
        for measure, sum_C1 in self.plain.items():
            x_CS = terms.get(measure)
            sum_C1.add_(e_CS.sum(-1, keepdim=True) if x_CS is None else _dot(e_CS, x_CS))
        # From here on e_v stands for e_v s_v.
        if slope_CS is not None:
            e_CS.mul_(slope_CS)
        for measure, sum_CD in self.pulled.items():
            x_CS = terms.get(measure)
            # In place, because the terms are not needed any more.
            sum_CD.add_(pull(e_CS if x_CS is None else x_CS.mul_(e_CS)))

    def _logits(self, hidden_CD: Tensor, columns: slice, *, pull: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        raw_CS, pulled = self.head.part(hidden_CD, columns, pull=pull)
        return self.head.finish_(raw_CS), pulled

    def _targets_in(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Column of each token's target within the slice, and whether it is there at all."""
        local_C1 = self.targets_C1 - columns.start
        here_C1 = (local_C1 >= 0) & (local_C1 < columns.stop - columns.start)
        return local_C1.clamp(0, columns.stop - columns.start - 1), here_C1

    def _apart(self, z_CS: Tensor, columns: slice) -> Tensor:
        """z - z_other - centre, after the other's own sum was taken."""
        assert self.other_CD is not None
        other_CS, _ = self._logits(self.other_CD, columns, pull=False)
        other_CS.div_(self.job.temperature)
        local_C1, here_C1 = self._targets_in(columns)
        self.target_other_C1 = torch.where(here_C1, other_CS.gather(1, local_C1), self.target_other_C1)
        highest_C1 = torch.maximum(self.other_max_C1, other_CS.amax(-1, keepdim=True))
        mass_C1 = (other_CS - highest_C1).exp_().sum(-1, keepdim=True)
        self.other_mass_C1 = self.other_mass_C1 * (self.other_max_C1 - highest_C1).exp_() + mass_C1
        self.other_max_C1 = highest_C1
        return other_CS.neg_().add_(z_CS).sub_(self.centre_C1)

    def _raise_maximum(self, z_CS: Tensor) -> None:
        """Bring all sums to the maximum that includes these logits; entropy's x moves with it."""
        highest_C1 = torch.maximum(self.max_C1, z_CS.amax(-1, keepdim=True))
        step_C1 = self.max_C1 - highest_C1
        factor_C1, self.max_C1 = step_C1.exp(), highest_C1
        for sums in (self.plain, self.pulled):
            # x = z - max moves by step for every v, so sum e (x + step) = sum e x + step sum e. Before the sums are rescaled.
            if "entropy" in sums:
                sums["entropy"].addcmul_(step_C1, sums["logprobs"])
            for sum_ in sums.values():
                sum_.mul_(factor_C1)

    def log_total(self) -> Tensor:
        """Return log sum_v exp(z_v) of each token `[C]`."""
        return (self.max_C1 + (self.plain["logprobs"] + (self.target_z_C1 - self.max_C1).exp()).log())[:, 0]

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Values `[C]` of what was asked, gradients `[C, D]` of what is differentiated, in their orders."""
        target_z_C1 = self.target_z_C1 - self.max_C1
        target_e_C1 = target_z_C1.exp()
        # Join the target, which `add` left out.
        total_C1 = self.plain["logprobs"] + target_e_C1
        at_target: dict[Measure, Tensor] = {
            "entropy": target_z_C1,
            "kl": self.target_z_C1 - self.target_other_C1 - self.centre_C1,
        }
        # Means under p: sum_v p_v x_v.
        mean: dict[Measure, Tensor] = {
            m: (self.plain[m] + target_e_C1 * x_C1) / total_C1 for m, x_C1 in at_target.items() if m in self.plain
        }
        values = [self._value(measure, mean, total_C1)[:, 0] for measure in self.job.asked]
        gradients = []
        scale_C1 = self.head.scale / self.job.temperature / total_C1
        for measure in self.job.differentiated:
            if measure == "logprobs":
                # (1 - p_target) W_target - sum over the others of p_v W_v, times the total: 1 - p_target is the others' share.
                of_target_C1, sum_CD = self.plain["logprobs"], -self.pulled["logprobs"]
            else:
                # sum_v p_v (x_v - mean) W_v, times the total; the target's term joins below.
                of_target_C1 = target_e_C1 * (at_target[measure] - mean[measure])
                sum_CD = self.pulled[measure] - mean[measure] * self.pulled["logprobs"]
            sum_CD.addcmul_(of_target_C1 * self.target_slope_C1, self.target_weights_CD)
            gradients.append(sum_CD.mul_(-scale_C1 if measure == "entropy" else scale_C1))
        return values, gradients

    def _value(self, measure: Measure, mean: dict[Measure, Tensor], total_C1: Tensor) -> Tensor:
        if measure == "logprobs":
            return self.target_z_C1 - self.max_C1 - total_C1.log()
        if measure == "entropy":
            return total_C1.log() - mean["entropy"]
        # KL = E[z - z_other] - log sum_v exp(z_v) + log sum_v exp(z_other_v)
        other_total_C1 = self.other_max_C1 + self.other_mass_C1.log()
        return mean["kl"] + self.centre_C1 - (self.max_C1 + total_C1.log()) + other_total_C1


def _dot(one_CS: Tensor, other_CS: Tensor) -> Tensor:
    """Row by row, `[C, 1]`, without a product of their size."""
    return torch.bmm(one_CS[:, None], other_CS[:, :, None])[:, 0]
