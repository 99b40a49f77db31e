"""Peak memory of each phase of a run, from the engine's and the learners' own functions run on shapes.

Shapes: B rows, P prompt tokens, R reply tokens, T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from selfeval.backbone.families.cache import PreallocatedLayer
from selfeval.backbone.placement import DeviceMap
from selfeval.backbone.sequences import Sequences, final_scores
from selfeval.backbone.shared_prefixes import PrefixLayout, uniform_layout
from selfeval.config import CriticConfig, EvaluatorConfig, Pooling, RunConfig
from selfeval.planner.shape_tracing import Footprint, Peaks, ShapeBackbone
from selfeval.prompt import Prompt
from selfeval.rollout.batch import Batch
from selfeval.rollout.guide import Guide
from selfeval.rollout.next_tokens import last_logprobs
from selfeval.rollout.requests import Request
from selfeval.rollout.rows import joins_rows
from selfeval.runs.members import member_roles
from selfeval.stages.shards import START
from selfeval.training.context import POLICY, REFERENCE, LearnerContext
from selfeval.training.evaluator import EVALUATOR, pair_loss
from selfeval.training.experience import Experience, acting_logprobs
from selfeval.training.gradient_accumulation import add_gradients
from selfeval.training.learners import Learner, make_learner
from selfeval.training.learners.learner import Peak
from selfeval.training.scoring import EvaluatorScorer

__all__ = [
    "UNFILTERED",
    "Shape",
    "ShapeLoop",
    "add_optimizer",
    "evaluator_peak",
    "label_peak",
    "optimizer_bytes",
    "rollout_peak",
    "score_peaks",
    "update_peaks",
]


T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """A batch of `rows` replies that all have the maximum length.

    Attributes:
        prompt, reply: tokens of a prompt and of a reply.
        grade: tokens of the prompt of evaluator and critic.
        per_prompt: neighbouring replies with the same prompt.
    """

    rows: int
    prompt: int
    reply: int
    grade: int = 0
    per_prompt: int = 1

    def of(self, rows: int, per_prompt: int | None = None) -> Shape:
        """Return the shape of another number of rows, and of replies to the same prompt."""
        return replace(self, rows=rows, per_prompt=per_prompt or self.per_prompt)

    def policy_batch(self) -> Sequences:
        return _sequences(self, self.prompt)

    def critic_batch(self) -> Sequences:
        return _sequences(self, self.grade)


@dataclass(frozen=True)
class ShapeLoop:
    """The policy training of a configuration on shapes: a backbone with all roles, and the learner that declares the peaks.

    `members` are the evaluators whose passes are traced: the first one of each rank and pooling.
    """

    backbone: ShapeBackbone
    context: LearnerContext
    learner: Learner
    members: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, model: Any, dtype: torch.dtype, placement: DeviceMap, attention: str | None) -> ShapeLoop:
        """Build the roles of policy training on shapes.

        Args:
            config: configuration of the run.
            model: config of transformers.
            dtype: of the base weights.
            placement: which device holds which layer.
            attention: optional attention implementation. Default: that of the family.
        """
        made: list[tuple[LearnerContext, Learner]] = []

        def add_roles(backbone: ShapeBackbone) -> None:
            _add_members(backbone, config)
            if REFERENCE not in backbone.roles.names:
                backbone.roles.add_snapshot(REFERENCE, of=POLICY)
            # The token limits are not read: the micro-batches are formed below.
            scorer = EvaluatorScorer(backbone, batch_tokens=1)
            context = LearnerContext(
                backbone, config.policy, scorer, seed=0, limit=1, batch_size=1, batch_tokens=1, evaluator=EVALUATOR
            )
            made.append((context, make_learner(context)))

        backbone = ShapeBackbone(model, dtype, config.backbone.lora, _roles(config), placement, attention, add_roles)
        return cls(backbone, *made[0], members=_traced_members(config))

    @property
    def trained(self) -> tuple[str, ...]:
        """Roles with an optimizer."""
        return tuple(self.learner.optimizers.by_role)

    @property
    def has_critic(self) -> bool:
        return issubclass(self.context.config.spec.config, CriticConfig)


def _roles(config: RunConfig) -> dict[str, bool]:
    """Return the adapters of policy training without evaluators and the learner's own; True for those with a head.

    The reference is the bare base, without an adapter, unless it moves or is the policy of an earlier round.
    """
    roles = {POLICY: False}
    if config.rounds > 1:
        roles[START] = False
    if config.rounds > 1 or config.policy.reference_ema is not None:
        roles[REFERENCE] = False
    return roles


def _add_members(backbone: ShapeBackbone, config: RunConfig) -> None:
    """Add the evaluators with their ranks. All read the last layer, which is an upper bound."""
    for number, role in enumerate(member_roles(config)):
        read = config.evaluator.input_of(number)
        backbone.roles.add(role, head=True, rank=read.rank, pooling=read.pooling)


def _traced_members(config: RunConfig) -> tuple[str, ...]:
    """Return the first member of each rank and pooling; the passes of the others take the same memory."""
    found: dict[tuple[int | None, Pooling], str] = {}
    for number, role in enumerate(member_roles(config)):
        read = config.evaluator.input_of(number)
        found.setdefault((read.rank, read.pooling), role)
    return tuple(found.values())


@dataclass(frozen=True)
class _ShapeSequences(Sequences):
    """Sequences on shapes, whose layout cannot be computed from their values."""

    shape: Shape
    prompt: int

    @property
    def _prompts(self) -> int:
        """Distinct prompts: with a rest, the first and the last may have only some of their replies in the batch."""
        whole, rest = divmod(self.shape.rows, self.shape.per_prompt)
        return min(self.shape.rows, whole + 2 * (rest > 0))

    def layout_tokens(self, *, last: bool) -> int:
        return self._prompts * self.prompt + self.shape.rows * (self.shape.reply - (not last))

    def layout(self, *, last: bool) -> PrefixLayout:
        return uniform_layout(self._prompts, self.shape.rows, self.prompt, self.shape.reply - (not last))


def _sequences(shape: Shape, prompt: int) -> Sequences:
    rows, reply = shape.rows, shape.reply
    return _ShapeSequences(
        torch.zeros(rows, prompt + reply, dtype=torch.int64),
        torch.ones(rows, prompt + reply, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, reply, dtype=torch.int64),
        torch.ones(rows, reply, dtype=torch.bool),
        torch.zeros(rows, dtype=torch.int64),
        shape,
        prompt,
    )


def _experience(shape: Shape, *, critic: bool) -> Experience:
    """Return an experience of this shape; values and returns only for learners with a critic."""

    def per_token() -> Tensor:
        return torch.zeros(shape.rows, shape.reply)

    return Experience(
        shape.policy_batch(),
        shape.critic_batch(),
        groups_B=torch.zeros(shape.rows, dtype=torch.int64),
        scores_B=torch.zeros(shape.rows),
        logprobs=per_token(),
        ref_logprobs=per_token(),
        rewards=per_token(),
        kl_coefficient=0.0,
        values=per_token() if critic else None,
        returns=per_token() if critic else None,
        advantages=per_token(),
    )


# -- sampling -------------------------------------------------------------------------------------------------------------


UNFILTERED = Request(Prompt(()))
"""Sampling from the whole distribution, without a prompt."""


def rollout_peak(
    backbone: ShapeBackbone,
    shape: Shape,
    *,
    prompts: int,
    role: str,
    settings: Request = UNFILTERED,
    waiting: bool = False,
    guide: Guide | None = None,
) -> Peaks:
    """Trace the first and the last steps of a batch of the engine, and return the peak by device and kind.

    Args:
        shape: of the batch.
        prompts: number of distinct prompts.
        role: acting role.
        settings: sampling settings, without a prompt. Default: the whole distribution at temperature 1.
        waiting: whether further requests wait for a place in the batch, which has more columns then. Default: False.
        guide: optional value guidance.
    """
    meter = backbone.footprint()
    # Equal prompts share their prefill in the engine, so use exactly `prompts` different ones.
    waits = waiting and joins_rows(backbone, guide)
    count = 2 * shape.rows if waits else shape.rows
    # Neighbours share their prompt, as in the order in which the engine takes them.
    numbers = [row * prompts // shape.rows for row in range(count)]
    requests = [replace(settings, prompt=Prompt((number,) * shape.prompt)) for number in numbers]
    with torch.no_grad(), backbone.shapes, meter, backbone.acting_as(role):
        batch = Batch(backbone, requests, range(count), shape.reply, (), (), 0, guide, places=shape.rows)
        layers = _metered(batch, meter)
        tokens = batch.rows.draw(batch.prefill()[0])
        # The last two steps; in the very last, the rows move together because one is finished.
        for step, rows in ((shape.reply - 2, shape.rows), (shape.reply - 1, max(1, shape.rows - 1))):
            if step > 0:
                length = shape.prompt + step - 1
                # The steps in between were skipped: set the caches to the length that they would have by now.
                for layer in layers:
                    layer.length = length
                attention = torch.ones(len(tokens), length, dtype=torch.int64)
                tokens = batch.rows.draw(batch.rows.advance(range(rows), tokens, attention)[0])
        if waits:
            # All rows have ended, and as many requests begin; the cache is allocated by now.
            attention = torch.ones(len(tokens), shape.prompt + shape.reply - 1, dtype=torch.int64)
            batch.rows.draw(batch.rows.advance((), tokens, attention, batch.next(shape.rows))[0])
    return meter.peaks


def label_peak(backbone: ShapeBackbone, prompt: int, rows: int, *, role: str) -> Peaks:
    """Trace a pass that reads label probabilities right after prompts; no prompts share a start, which takes the most memory.

    Args:
        backbone: of the model.
        prompt: tokens of a prompt, at least 2.
        rows: prompts of the pass.
        role: acting role.
    """
    meter = backbone.footprint()
    with torch.no_grad(), backbone.shapes, meter, backbone.acting_as(role):
        last_logprobs(backbone, _sequences(Shape(rows, prompt - 1, 1), prompt - 1), torch.zeros(1, dtype=torch.int64))
    return meter.peaks


def _metered(batch: Batch, meter: Footprint) -> list[PreallocatedLayer]:
    """Replace the preallocated layers of a batch's caches by layers that label their tensors, and return these."""
    found = []
    for part in batch.rows.passes:
        layers = [_MeteredLayer(meter, layer) if isinstance(layer, PreallocatedLayer) else layer for layer in part.cache.layers]
        part.cache.layers = layers
        found += [layer for layer in layers if isinstance(layer, PreallocatedLayer)]
    return found


class _MeteredLayer(PreallocatedLayer):
    """The engine's cache layer, which labels its tensors as `kv_cache`."""

    def __init__(self, meter: Footprint, layer: PreallocatedLayer) -> None:
        super().__init__(layer.room, layer.rows, layer.length)
        self.meter = meter

    def _empty(self, states: Tensor, rows: int, columns: int) -> Tensor:
        made = super()._empty(states, rows, columns)
        self.meter.label([made], "kv_cache")
        return made

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.meter.label([t for t in (self.keys, self.values) if t is not None], "kv_cache")


# -- scoring and updating -------------------------------------------------------------------------------------------------


def score_peaks(loop: ShapeLoop, shape: Shape, *, replies: int) -> Peaks:
    """Trace the passes without gradient: reference, evaluator, and those that the learner declares.

    No prompt is shared, as in the scoring of single replies to many questions, which takes the most memory.

    Args:
        shape: of the largest micro-batch.
        replies: replies of an iteration.
    """
    backbone, learner, shape = loop.backbone, loop.learner, replace(shape, per_prompt=1)
    meter = backbone.footprint()
    with torch.no_grad(), backbone.shapes, meter:
        # The experience of the whole iteration stays in memory during every pass.
        kept = _experience(shape.of(replies), critic=loop.has_critic)
        with backbone.acting_as(REFERENCE):
            acting_logprobs(loop.context, shape.policy_batch())
        for member in loop.members:
            with backbone.acting_as(member):
                final_scores(backbone, member, shape.critic_batch())
        for peak in learner.scoring_peaks(replies):
            with backbone.acting_as(peak.role):
                peak.work(_experience(_microbatch(peak, shape), critic=loop.has_critic))
        del kept
    add_optimizer(meter.peaks, backbone, loop.trained)
    return meter.peaks


def update_peaks(loop: ShapeLoop, shape: Shape, *, replies: int) -> list[Peaks]:
    """Trace the backward passes that the learner declares, with the gradients of earlier micro-batches in memory.

    Args:
        shape: of the largest micro-batch.
        replies: replies of an iteration.
    """
    return [_update_peak(loop, peak, shape, replies) for peak in loop.learner.update_peaks(replies)]


def _update_peak(loop: ShapeLoop, peak: Peak, shape: Shape, replies: int) -> Peaks:
    parts = shape.of(replies), shape.of(peak.replies), _microbatch(peak, shape)

    def batches() -> list[Experience]:
        """Return the iteration's experience, the minibatch and the micro-batch, which the loop all holds."""
        return [_experience(part, critic=loop.has_critic) for part in parts]

    peaks = _backward_peak(loop.backbone, peak.role, batches, lambda held: peak.work(held[-1]))
    add_optimizer(peaks, loop.backbone, loop.trained)
    return peaks


def _microbatch(peak: Peak, shape: Shape) -> Shape:
    """Return the shape of a micro-batch if as many rows as in `shape` fit."""
    rows = min(shape.rows, peak.replies)
    if peak.in_pairs:
        return shape.of(max(2, rows - rows % 2), per_prompt=2)
    return shape.of(rows, peak.per_prompt)


def evaluator_peak(backbone: ShapeBackbone, shape: Shape, config: EvaluatorConfig, role: str = EVALUATOR) -> Peaks:
    """Trace the training of an evaluator, or of a step evaluator, which has no other role in memory.

    Args:
        shape: of a micro-batch; an even number of rows, with two replies to a prompt in pairs.
        config: settings of the evaluator.
        role: Optional. Name of the evaluator. Default: the first one.
    """

    def loss(batch: Sequences) -> Tensor:
        return pair_loss(backbone, role, batch, torch.zeros(shape.rows // 2), config)[0]

    peaks = _backward_peak(backbone, role, shape.critic_batch, loss)
    add_optimizer(peaks, backbone, (role,))
    # The backbone has all adapters of policy training: count the evaluator's alone.
    own = backbone.adapters((role,))
    for device, peak in peaks.items():
        peak["adapters"] = _bytes(own.get(device, []))
    return peaks


def _backward_peak(backbone: ShapeBackbone, role: str, hold: Callable[[], T], work: Callable[[T], Tensor | None]) -> Peaks:
    """Trace a backward pass; only the gradients of the role it trains are in memory.

    Args:
        role: acting role.
        hold: creates the tensors that are in memory during the forward and the backward pass.
        work: computes the loss from them, or None if nothing is differentiated further.
    """
    # Gradients exist before the pass, as they do after earlier micro-batches. The meter is created after them to count them.
    parameters = list(backbone.roles.parameters(role).values())
    with backbone.shapes:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    meter = backbone.footprint()
    with backbone.shapes, meter, backbone.acting_as(role):
        held = hold()
        loss = work(held)
        if loss is not None:
            add_gradients(loss, parameters)
        del held
    for parameter in parameters:
        parameter.grad = None
    return meter.peaks


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def optimizer_bytes(backbone: ShapeBackbone, roles: Sequence[str]) -> dict[str, int]:
    """Return AdamW's state by device: two moments of every weight, and a step counter of every tensor (fp32)."""
    return {device: 2 * _bytes(held) + 4 * len(held) for device, held in backbone.adapters(roles).items()}


def add_optimizer(peaks: Peaks, backbone: ShapeBackbone, roles: Sequence[str]) -> None:
    """Add the optimizers of these roles to the peaks, which were found without them."""
    for device, size in optimizer_bytes(backbone, roles).items():
        peaks[device]["optimizer"] = size
