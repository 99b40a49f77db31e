"""Peak memory of each phase of the loop, measured by running its own forward and backward passes on fake tensors.

Shapes: B rows, P prompt tokens, R reply tokens, T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfeval.algorithms.masked import masked_sum
from selfeval.algorithms.policy_losses import ppo_clip_loss
from selfeval.algorithms.value_losses import clipped_value_loss
from selfeval.backbone.adapters import BASE
from selfeval.backbone.families.cache import RoomyLayer, roomy_cache, select_rows, state_arguments
from selfeval.backbone.footprint import Footprint, Peaks, ShapeBackbone
from selfeval.backbone.logprobs import tile_bytes, token_logprobs
from selfeval.backbone.sequences import Sequences, final_scores, reply_hidden
from selfeval.rollout.draws import pick
from selfeval.training.context import CRITIC, POLICY
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.gradient_accumulation import add_gradients

__all__ = [
    "LEARNING",
    "POLICY_ROLES",
    "Shape",
    "add_optimizer",
    "optimizer_bytes",
    "rollout_peak",
    "score_peak",
    "update_peaks",
]

POLICY_ROLES = {EVALUATOR: True, POLICY: False, CRITIC: True}
"""Adapters in memory during policy training (the reference is the bare base); True for roles with a head."""

LEARNING = (POLICY, CRITIC)
"""The adapters that are trained."""


@dataclass(frozen=True)
class Shape:
    """Shape of a batch: number of rows, and the tokens of each prompt and reply."""

    rows: int
    prompt: int
    reply: int

    @property
    def length(self) -> int:
        return self.prompt + self.reply


def _sequences(shape: Shape) -> Sequences:
    whole, replies = (shape.rows, shape.length), (shape.rows, shape.reply)
    return Sequences(
        torch.zeros(whole, dtype=torch.int64),
        torch.ones(whole, dtype=torch.int64),
        torch.zeros(shape.rows, dtype=torch.int64),
        torch.zeros(replies, dtype=torch.int64),
        torch.ones(replies, dtype=torch.bool),
    )


_PER_REPLY_TOKEN = 6
"""Numbers per reply token in an experience: log-probs, reference log-probs, values, advantages, returns, rewards."""


def _experience(shape: Shape, grade_prompt: int) -> list[Any]:
    """Allocate the tensors of an experience: the replies after both prompts, and the numbers of each token."""
    numbers = [torch.zeros(shape.rows, shape.reply) for _ in range(_PER_REPLY_TOKEN)]
    return [_sequences(shape), _sequences(Shape(shape.rows, grade_prompt, shape.reply)), *numbers]


def rollout_peak(backbone: ShapeBackbone, shape: Shape, *, prompts: int, nucleus: bool, role: str) -> Peaks:
    """Return the peak bytes of sampling by device and kind, reached at the last token.

    Args:
        backbone: the model without weights.
        shape: of the replies that are sampled at once.
        prompts: number of distinct prompts, each of which is prefilled once.
        nucleus: whether top-p sampling sorts the distribution.
        role: the role that samples.
    """
    meter = backbone.footprint()
    with torch.no_grad(), backbone.fake, meter, backbone.acting_as(role):
        cache = roomy_cache(backbone.model.config, shape.reply)
        cache.layers = [_MeteredLayer(meter, shape.reply) if isinstance(layer, RoomyLayer) else layer for layer in cache.layers]
        logits = _next_logits(backbone, cache, prompts, shape.prompt, shape.prompt)
        if prompts < shape.rows:
            rows = torch.zeros(shape.rows, dtype=torch.int64)
            select_rows(cache, rows)
            logits = logits[rows]
        _sample(logits, nucleus)
        for layer in cache.layers:
            if isinstance(layer, RoomyLayer):
                layer.length = shape.length - 1
        del logits
        _sample(_next_logits(backbone, cache, shape.rows, 1, shape.length), nucleus)
        select_rows(cache, torch.zeros(shape.rows - 1, dtype=torch.int64))
    return meter.peaks


def _next_logits(backbone: ShapeBackbone, cache: Any, rows: int, new: int, seen: int) -> Tensor:
    attention = torch.ones(rows, seen, dtype=torch.int64)
    arguments: dict[str, Any] = {"input_ids": torch.zeros(rows, new, dtype=torch.int64)}
    arguments |= state_arguments(backbone.loaded, cache, attention, new)
    if backbone.loaded.forward_accepts("position_ids"):
        arguments["position_ids"] = (attention.cumsum(-1) - 1).clamp_min(0)[:, -new:]
    if backbone.loaded.forward_accepts("logits_to_keep"):
        arguments["logits_to_keep"] = torch.tensor([new - 1])
    return backbone.model(**arguments, use_cache=True).logits[:, -1].float()  # type: ignore[no-any-return]


def _sample(logits_BV: Tensor, nucleus: bool) -> None:
    """Allocate the tensors of the engine when it draws one token per row; a test compares the two."""
    scaled_BV = logits_BV / torch.ones(len(logits_BV), 1)
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    allowed_BV = _within_nucleus(logprobs_BV) if nucleus else logprobs_BV
    pick(allowed_BV, torch.rand(len(allowed_BV), dtype=torch.float64))


def _within_nucleus(logprobs_BV: Tensor) -> Tensor:
    sorted_BV, index_BV = logprobs_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
    outside_BV = (before_BV >= 1) & torch.ones(len(before_BV), 1, dtype=torch.bool)
    return sorted_BV.masked_fill(outside_BV, float("-inf")).gather(1, index_BV.argsort(-1))


class _MeteredLayer(RoomyLayer):
    """The engine's cache layer, with its tensors reported to the meter by kind."""

    def __init__(self, meter: Footprint, room: int) -> None:
        super().__init__(room)
        self.meter = meter

    def _empty(self, states: Tensor) -> Tensor:
        made = super()._empty(states)
        self.meter.label([made], "kv_cache")
        return made

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.meter.label([t for t in (self.keys, self.values) if t is not None], "kv_cache")


def score_peak(backbone: ShapeBackbone, shape: Shape, *, grade_prompt: int, replies: int) -> Peaks:
    """Return the peak bytes of scoring by device and kind: reference log-probs, evaluator scores or values, no gradients.

    Args:
        backbone: the model without weights.
        shape: of a micro-batch.
        grade_prompt: tokens of the prompt of evaluator and critic.
        replies: number of replies of the iteration.
    """
    graded = Shape(shape.rows, grade_prompt, shape.reply)
    meter = backbone.footprint()
    with torch.no_grad(), backbone.fake, meter:
        kept = _experience(Shape(replies, shape.prompt, shape.reply), grade_prompt)
        with backbone.acting_as(BASE):  # the reference of a policy that starts there
            batch = _sequences(shape)
            _logprobs(backbone, batch)
        with backbone.acting_as(EVALUATOR):
            final_scores(backbone, EVALUATOR, _sequences(graded))
        with backbone.acting_as(CRITIC):
            backbone.score(CRITIC, reply_hidden(backbone, _sequences(graded)))
        del kept
    return meter.peaks


def update_peaks(
    backbone: ShapeBackbone, shape: Shape, *, grade_prompt: int, minibatch: int, replies: int, evaluator_rows: int
) -> list[Peaks]:
    """Return the peak bytes of each trained role by device and kind: policy, critic, and the evaluator if its batch is larger.

    The gradients accumulated over earlier micro-batches are included.

    Args:
        backbone: the model without weights.
        shape: of a micro-batch.
        grade_prompt: tokens of the prompt of evaluator and critic.
        minibatch: replies per gradient step.
        replies: number of replies of the iteration.
        evaluator_rows: replies per micro-batch of evaluator training.
    """
    graded = Shape(shape.rows, grade_prompt, shape.reply)

    def kept() -> list[Any]:
        return [_experience(Shape(n, shape.prompt, shape.reply), grade_prompt) for n in (replies, minibatch, shape.rows)]

    peaks = [
        _backward_peak(backbone, POLICY, LEARNING, lambda: _policy_loss(backbone, shape), kept),
        _backward_peak(backbone, CRITIC, LEARNING, lambda: _critic_loss(backbone, graded), kept),
    ]
    if evaluator_rows > shape.rows:  # otherwise the critic, which reads the same prompt, has the higher peak
        compared = Shape(evaluator_rows, grade_prompt, shape.reply)
        alone = _backward_peak(backbone, EVALUATOR, (EVALUATOR,), lambda: _evaluator_loss(backbone, compared), list)
        own = backbone.adapters((EVALUATOR,))
        for device, peak in alone.items():
            peak["adapters"] = _bytes(own.get(device, []))
        peaks.append(alone)
    return peaks


def _backward_peak(
    backbone: ShapeBackbone, role: str, learning: Sequence[str], loss: Callable[[], Tensor], kept: Callable[[], list[Any]]
) -> Peaks:
    parameters = list(backbone.parameters(role).values())  # gradients of other roles are freed before these are allocated
    with backbone.fake:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    meter = backbone.footprint()
    with backbone.fake, meter, backbone.acting_as(role):
        held = kept()
        add_gradients(loss(), parameters)
        del held
    for parameter in parameters:
        parameter.grad = None
    add_optimizer(meter.peaks, backbone, learning)
    return meter.peaks


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def optimizer_bytes(backbone: ShapeBackbone, roles: Sequence[str]) -> dict[str, int]:
    """Return the bytes of AdamW's state by device: two moments per weight, and an fp32 step counter per tensor."""
    return {device: 2 * _bytes(held) + 4 * len(held) for device, held in backbone.adapters(roles).items()}


def add_optimizer(peaks: Peaks, backbone: ShapeBackbone, roles: Sequence[str]) -> None:
    """Add the optimizer states of these roles, which did not exist when the peaks were measured."""
    for device, size in optimizer_bytes(backbone, roles).items():
        peaks[device]["optimizer"] = size


def _logprobs(backbone: ShapeBackbone, batch: Sequences, *, entropy: bool = False) -> Tensor:
    """Compute log-probs in tiles of the size for the main device, because fake tensors report the CPU as their device."""
    hidden, tile = reply_hidden(backbone, batch), tile_bytes(backbone.main.partition(":")[0])
    return token_logprobs(backbone, hidden, batch.reply_BR, batch.mask_BR, entropy=entropy, chunk_bytes=tile).logprobs


def _policy_loss(backbone: ShapeBackbone, shape: Shape) -> Tensor:
    batch = _sequences(shape)
    logprobs = _logprobs(backbone, batch, entropy=True)
    before = torch.zeros_like(logprobs)
    return masked_sum(ppo_clip_loss(logprobs, before, before, clip_low=0.2, clip_high=0.2), batch.mask_BR)


def _critic_loss(backbone: ShapeBackbone, shape: Shape) -> Tensor:
    batch = _sequences(shape)
    values = backbone.score(CRITIC, reply_hidden(backbone, batch))
    before = torch.zeros_like(values)
    return masked_sum(clipped_value_loss(values, before, before, clip=0.2), batch.mask_BR)


def _evaluator_loss(backbone: ShapeBackbone, shape: Shape) -> Tensor:
    chosen, rejected = final_scores(backbone, EVALUATOR, _sequences(shape)).chunk(2)
    return torch.nn.functional.softplus(rejected - chosen).sum()  # bradley_terry_loss reads values; same memory
