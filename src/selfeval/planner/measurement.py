"""Peak memory of the phases of a model at full depth, from traces of a few of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import groupby

import torch

from selfeval.backbone.adapters import BASE
from selfeval.backbone.budget import prompt_pass_tokens
from selfeval.backbone.meters import kept_by_allocator, kernel_bytes
from selfeval.backbone.placement import DeviceMap
from selfeval.backbone.precision import DTYPES
from selfeval.backbone.sizes import WeightSizes
from selfeval.config import RunConfig
from selfeval.planner.memory_plan import at_depth
from selfeval.planner.model_configs import ModelFacts, weigh
from selfeval.planner.phase_peaks import (
    UNFILTERED,
    Shape,
    ShapeLoop,
    add_optimizer,
    evaluator_peak,
    label_peak,
    rollout_peak,
    score_peaks,
    update_peaks,
)
from selfeval.planner.shape_tracing import Peaks, ShapeBackbone, computes, fullest
from selfeval.planner.workload import Workload
from selfeval.rollout.requests import Request
from selfeval.training.context import POLICY

__all__ = ["Measured"]

_NUCLEUS = 0.9
"""Any top-p below 1: the memory of sorting the vocabulary does not depend on it."""


class Measured:
    """Peak memory of the phases of one model, measured by running them on shapes at a few of its depths.

    Consecutive layers on one device form a span. The model is run with a few layers (or periods of layers) in each span, then
    once per span with one more layer there. The difference is the cost of each additional layer of that span.

    Args:
        checkpointing: whether layers are recomputed in the backward pass.
    """

    def __init__(
        self,
        facts: ModelFacts,
        config: RunConfig,
        precision: str,
        placement: DeviceMap,
        work: Workload,
        checkpointing: bool,
        runtime: int,
    ) -> None:
        self.facts, self.config, self.precision, self.work = facts, config, precision, work
        self.placement, self.checkpointing = placement, checkpointing
        self.runtime = runtime
        # oneDNN keeps compiled kernels for 16-bit products on a CPU only.
        self.kernels = kernel_bytes() if placement.main == "cpu" and precision != "fp32" else 0
        self.spans = [(device, len(list(run))) for device, run in groupby(placement.devices)]
        # Without a known period no layers can be left out, and `whole` is true below.
        self.period = facts.period or facts.layers
        self.few = 2 if len(self.spans) <= 2 else 1  # every span adds a model to run
        # Measure the model itself if the deepest of the shallow ones would have as many layers.
        self.whole = (self.few * len(self.spans) + 1) * self.period >= facts.layers
        # Cached per instance, because the search and the final plan ask for the same rows. A cache on the methods of the class
        # would keep every instance alive.
        self.rollout, self.learning = cache(self._rollout), cache(self._learning)

    def _shallow(self, deeper: int | None = None) -> DeviceMap:
        """Return the device map with few periods of layers in each span, and optionally one more period in one span."""
        counts = [(self.few + (number == deeper)) * self.period for number in range(len(self.spans))]
        devices = [d for (d, _), count in zip(self.spans, counts, strict=True) for _ in range(count)]
        return replace(self.placement, layers=self.placement.layers[: len(devices)], devices=tuple(devices))

    @cached_property
    def loops(self) -> list[ShapeLoop]:
        """The shallow model, and for each span one that is deeper there; only the whole model if it is not deep."""
        spread = [self._shallow(), *(self._shallow(number) for number in range(len(self.spans)))]
        # Packed weights are computed in bf16.
        dtype = DTYPES.get(self.precision, torch.bfloat16)
        made = []
        for placed in [self.placement] if self.whole else spread:
            model = self.facts.with_layers(len(placed.devices))
            made.append(ShapeLoop.of(self.config, model, dtype, placed, self.facts.attention))
        for loop in made if self.checkpointing else []:
            loop.backbone.recompute_layers()
        return made

    def _peak(self, trial: Callable[[ShapeLoop], list[Peaks]], brought: int) -> Peaks:
        """Return the maximum of a trial's peaks, each extrapolated to full depth and the actual weights.

        Args:
            trial: trial of a phase; may consist of several consecutive steps.
            brought: bytes of streamed weights on the main device at a time.
        """
        # Transpose: for each step of the trial, its peaks on the shallow model and on each deeper one.
        found = zip(*(trial(loop) for loop in self.loops), strict=True)
        return fullest(self._at_full_depth(first, deeper, brought) for first, *deeper in found)

    def _at_full_depth(self, first: Peaks, deeper: Sequence[Peaks], brought: int) -> Peaks:
        # Periods that each span has beyond those of the shallow model.
        steps = [count / self.period - self.few for _, count in self.spans] if deeper else []
        found: Peaks = {}
        for device, size in self.placement.bytes.items():
            peak = at_depth(first.get(device, {}), [one.get(device, {}) for one in deeper], steps)
            # The weights are counted, not extrapolated: packed ones are traced as if they were in bf16.
            peak["base"] = size + (brought if device == self.placement.main else 0)
            # Packed matrices are unpacked one at a time for their products, which the trace does not see.
            peak["activations"] += self.sizes.unpacked if computes(device, self.placement.main) else 0
            found[device] = self._with_process(device, peak)
        return found

    def _with_process(self, device: str, peak: Counter[str]) -> Counter[str]:
        """Add the process and its allocator's cached memory, on the CPU only."""
        if device != "cpu":
            return peak
        alive = sum(peak[kind] for kind in ("gradients", "kv_cache", "activations", "logits"))
        learning = peak["gradients"] > 0
        limited = self.config.backbone.memory_budget is not None
        # On a GPU, torch's allocator serves the passes, and glibc's has little to retain.
        kept = kept_by_allocator(alive, learning=learning, limited=limited) if self.placement.main == "cpu" else 0
        return peak + Counter(runtime=self.runtime, kernels=self.kernels, allocator=kept)

    @cached_property
    def sizes(self) -> WeightSizes:
        return weigh(self.facts, self.precision)

    @cached_property
    def _layer(self) -> int:
        """Bytes of the largest layer."""
        return max((self.sizes.within(layer) for layer in self.placement.streamed), default=0)

    @cached_property
    def _matrix(self) -> int:
        """Bytes of the largest weight of a streamed layer."""
        streamed = tuple(f"{layer}." for layer in self.placement.streamed)
        return max((size for name, size in self.sizes.bytes.items() if streamed and name.startswith(streamed)), default=0)

    def load(self) -> Peaks:
        """Return the memory in use before the first pass."""
        return {d: self._with_process(d, Counter(base=size)) for d, size in self.placement.bytes.items()}

    @property
    def replies(self) -> int:
        """Replies of an iteration."""
        return self.config.policy.questions_per_iteration * self.config.policy.replies_per_question

    def of_policy(self, rows: int) -> Peaks:
        """Return the peak of sampling `rows` replies at once in policy training; a guided reply is a row per role."""
        work = self.work

        def trial(loop: ShapeLoop) -> list[Peaks]:
            guide = loop.learner.guidance()
            replies = min(max(1, rows // (1 + len(guide.roles))) if guide else rows, self.replies)
            shape = Shape(replies, work.reply_prompt, work.reply)
            prompts = min(replies, self.config.policy.questions_per_iteration)
            waiting = replies < self.replies
            peaks = rollout_peak(loop.backbone, shape, prompts=prompts, role=POLICY, waiting=waiting, guide=guide)
            add_optimizer(peaks, loop.backbone, loop.trained)
            return [peaks]

        return self._peak(trial, self._matrix)

    def _of_base(self, trace: Callable[[ShapeBackbone], Peaks]) -> Peaks:
        """Return the peak of work of the bare base."""

        def trial(loop: ShapeLoop) -> list[Peaks]:
            peaks = trace(loop.backbone)
            # The bare base has no adapters in memory; the traced backbone has those of policy training.
            for peak in peaks.values():
                peak["adapters"] = 0
            return [peaks]

        return self._peak(trial, self._matrix)

    def _sampling(self, shape: Shape, settings: Request) -> Peaks:
        """Return the peak of sampling from the bare base, one reply per prompt, while further requests wait."""
        return self._of_base(
            lambda backbone: rollout_peak(backbone, shape, prompts=shape.rows, role=BASE, settings=settings, waiting=True)
        )

    def _judging(self, rows: int) -> Peaks:
        """Return the peak of the judge: of sampling its chain of thought, or of reading the label probabilities at once."""
        work = self.work
        if work.reasoning:
            return self._sampling(Shape(rows, work.judge_prompt, work.reasoning), UNFILTERED)
        # The limit of a pass of `next_logprobs`, which takes one prompt if it is longer.
        most = max(1, min(rows, prompt_pass_tokens(self.placement.main.partition(":")[0]) // work.judge_prompt))
        return self._of_base(lambda backbone: label_peak(backbone, work.judge_prompt, most, role=BASE))

    def _rollout(self, rows: int) -> Peaks:
        """Return the highest peak of sampling `rows` replies at once.

        The candidates are policy training, the judge, and collecting replies.
        """
        work, replies = self.work, self.config.replies
        filtered = replace(
            UNFILTERED,
            top_p=_NUCLEUS,
            top_k=replies.top_k,
            min_p=replies.min_p,
            repetition_penalty=replies.repetition_penalty,
        )
        replying = self._sampling(Shape(rows, work.reply_prompt, work.reply), filtered)
        return fullest([self.of_policy(rows), self._judging(rows), replying])

    def _learning(self, rows: int) -> dict[str, Peaks]:
        """Return the peaks of scoring and updating with micro-batches of `rows` of the longest sequences."""
        work, per_prompt = self.work, self.config.policy.replies_per_question
        shape = Shape(rows, work.reply_prompt, work.reply, work.grade_prompt, per_prompt)

        def score(loop: ShapeLoop) -> list[Peaks]:
            return [score_peaks(loop, shape.of(min(rows, self.replies)), replies=self.replies)]

        def update(loop: ShapeLoop) -> list[Peaks]:
            found = update_peaks(loop, shape, replies=self.replies)
            # A pair is two rows, so a micro-batch of the evaluator has an even number of them, at least 2.
            pairs = min(max(2, rows - rows % 2), 2 * self.config.evaluator.batch)
            # The replies of a step evaluator's batch are to different questions.
            of_pairs = shape.of(pairs, per_prompt=1 if self.config.steps.enabled else 2)
            found += [evaluator_peak(loop.backbone, of_pairs, self.config.evaluator, role) for role in loop.members]
            return found

        return {"score": self._peak(score, self._matrix), "update": self._peak(update, self._layer)}
