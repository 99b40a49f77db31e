"""plan: predict a run's memory use before anything is loaded, and find settings that fit."""

from __future__ import annotations

import copy
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any, get_args

import torch
from transformers.utils import is_bitsandbytes_available

from selfeval.backbone.adapter_check import check_adapters
from selfeval.backbone.adapters import BASE
from selfeval.backbone.facts import ModelFacts
from selfeval.backbone.families.cache import check_state
from selfeval.backbone.footprint import Peaks, ShapeBackbone, computes, fullest
from selfeval.backbone.load import Wanted, memory_within, pick_attention, place_base
from selfeval.backbone.meters import kept_by_allocator, kernel_bytes, resident_bytes
from selfeval.backbone.placement import DISK, ENDLESS, DeviceMap, free_memory, plan_placement, usable_memory
from selfeval.backbone.plan import DTYPES, PHASES, DevicePlan, Plan, at_depth, largest_fitting, weigh
from selfeval.backbone.precision import PRECISIONS
from selfeval.backbone.sizes import WeightSizes
from selfeval.config import PlacementConfig, RunConfig
from selfeval.errors import ConfigError, ModelError
from selfeval.judging.templates import template_texts, templates_folder
from selfeval.stages.shards import START
from selfeval.texts import format_bytes
from selfeval.training.context import POLICY, REFERENCE
from selfeval.training.phases import (
    LEARNING,
    POLICY_ROLES,
    Shape,
    add_optimizer,
    rollout_peak,
    score_peak,
    update_peaks,
)

__all__ = ["Machine", "Measured", "Workload", "make_plan", "workload"]

_CHARACTERS_PER_TOKEN = 3
_CHAT_TOKENS = 16
"""Approximate number of tokens that a chat template adds around a message."""


@dataclass(frozen=True)
class Workload:
    """Lengths of the longest texts that the configuration allows, and how many are processed at once.

    Attributes:
        reply_prompt, grade_prompt, judge_prompt: tokens before a reply, as read by policy, evaluator and judge.
        reply, working: token limits of a reply and of the judge's chain of thought.
    """

    reply_prompt: int
    grade_prompt: int
    judge_prompt: int
    reply: int
    working: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is scored or trained on."""
        return max(self.reply_prompt, self.grade_prompt) + self.reply


def workload(config: RunConfig, context: int | None) -> Workload:
    """Compute the largest workload that the limits allow; template text is counted at three characters per token."""
    texts = template_texts(templates_folder(config.model, config.templates))
    own = {name.removesuffix(".jinja"): len(text) // _CHARACTERS_PER_TOKEN + _CHAT_TOKENS for name, text in texts.items()}
    question, reply = config.questions.max_new_tokens, config.replies.max_new_tokens
    room = (context or 1 << 40) - 1
    reply_prompt = min(own["reply"] + question, room)
    shown_working = reply if "working" in texts["grade.jinja"] else 0
    grade_prompt = min(own["grade"] + question + shown_working, room)
    judge_prompt = min(own["judge"] + question + 2 * reply, room)
    return Workload(
        reply_prompt,
        grade_prompt,
        judge_prompt,
        min(reply, room + 1 - max(reply_prompt, grade_prompt)),
        min(config.verdicts.max_new_tokens if config.verdicts.working else 1, room + 1 - judge_prompt),
    )


# -- the machine ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The devices to plan for: those of this machine, or those named by the user.

    Attributes:
        memory: free bytes by device, in the order of use: cards, cpu, disk.
        limit: maximum bytes per device, if less than the free bytes.
        runtime: bytes of RAM used by the process itself: Python, torch and the other libraries.
    """

    memory: Mapping[str, int]
    limit: int | None = None
    runtime: int = 0

    @classmethod
    def of(cls, config: RunConfig, named: Mapping[str, int] | None = None) -> Machine:
        """Return the machine that a configuration runs on.

        Args:
            config: its `device` and `memory_budget` are used.
            named: Optional. Free bytes of the devices to plan for. Default: the devices of this machine.

        Raises:
            ConfigError: `device = cuda` with named devices, none of which is a card.
        """
        runtime = _runtime_bytes()
        if named:
            cards = {name: size for name, size in sorted(named.items()) if name.startswith("cuda:")}
            if config.device == "cuda" and not cards:
                raise ConfigError(f"device = cuda, but the devices named are {', '.join(named)}; name a card too: cuda:0=24GiB")
            beside = {"cpu": named.get("cpu", 0), DISK: named.get(DISK, ENDLESS)}
            return cls((cards if config.device != "cpu" else {}) | beside, config.memory_budget, runtime)
        wants_card = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        here = free_memory(torch.device("cuda" if wants_card and torch.cuda.is_available() else "cpu"))
        pretended = {"cuda:0": ENDLESS} if wants_card and not torch.cuda.is_available() else {}
        return cls(pretended | here, config.memory_budget, runtime)

    @property
    def kind(self) -> str:
        """Device type that computes: cuda or cpu."""
        return "cuda" if any(name.startswith("cuda:") for name in self.memory) else "cpu"

    @property
    def weights(self) -> dict[str, int]:
        """Free bytes as seen when loading."""
        return memory_within(self.memory, self.limit)

    def budget(self, device: str) -> int | None:
        """Return the total bytes that a run may use on a device.

        In RAM this includes the process itself, which the free bytes do not.
        """
        free = self.memory[device] + (self.runtime if device == "cpu" else 0)
        found = free if self.limit is None or device == DISK else min(free, self.limit)
        return None if found >= ENDLESS else found


def _runtime_bytes() -> int:
    """Measure the memory of this process after importing a run's libraries and triggering their lazy initialisation."""
    importlib.import_module("selfeval.stages.pipeline")
    weight = torch.zeros(64, 64, requires_grad=True)
    query, key, value = (torch.zeros(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
    torch.log_softmax(torch.zeros(64, 64) @ weight, dim=-1).sum().backward()
    torch.optim.AdamW([weight]).step()
    return resident_bytes()


def _roles(config: RunConfig) -> dict[str, bool]:
    """Return the adapters in memory during policy training.

    Later rounds also hold the role they start from, and a copy of it as the reference.
    """
    return POLICY_ROLES | ({START: False, REFERENCE: False} if config.rounds > 1 else {})


def _place(config: RunConfig, facts: ModelFacts, machine: Machine) -> tuple[str, DeviceMap, list[str]]:
    """Choose precision and device map as loading does, with notes; if nothing fits, put everything on the first device."""
    model, memory = facts.shell, machine.weights
    target = torch.device(machine.kind)
    wanted = Wanted(facts.name, model, config.device, config.precision, config.placement, memory)
    said: list[str] = []
    usable_memory(memory, config.placement)  # refuse a limit for a missing device early: no size would fix it
    try:
        picked, why, placement = place_base(wanted, target)
    except ModelError as error:
        single = PlacementConfig(mode="single")
        picked, why, placement = place_base(replace(wanted, placement=single), target)
        said.append(f"does not fit: {error}")
    if config.context.attention == "flash_attention_2" and (machine.kind == "cpu" or picked == "fp32"):
        pick_attention(config.context.attention, target, picked)
    return picked, placement or plan_placement(model, {next(iter(memory)): ENDLESS}, picked), ([why] if why else []) + said


# -- measuring on shapes --------------------------------------------------------------------------------------------------


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
        self.kernels = kernel_bytes() if placement.main == "cpu" and precision != "fp32" else 0
        self.spans = [(device, len(list(run))) for device, run in groupby(placement.devices)]
        self.period = facts.period or facts.layers
        self.few = 2 if len(self.spans) <= 2 else 1  # every span adds a model to run
        self.whole = (self.few * len(self.spans) + 1) * self.period >= facts.layers
        self.rollout, self.learning = cache(self._rollout), cache(self._learning)

    def _shallow(self, deeper: int | None = None) -> DeviceMap:
        """Return the device map with few periods of layers in each span, and optionally one more period in one span."""
        counts = [(self.few + (number == deeper)) * self.period for number in range(len(self.spans))]
        devices = [d for (d, _), count in zip(self.spans, counts, strict=True) for _ in range(count)]
        return replace(self.placement, layers=self.placement.layers[: len(devices)], devices=tuple(devices))

    @cached_property
    def backbones(self) -> list[ShapeBackbone]:
        spread = [self._shallow(), *(self._shallow(number) for number in range(len(self.spans)))]
        maps = [self.placement] if self.whole else spread
        made = [
            ShapeBackbone(
                self.facts.with_layers(len(placed.devices)),
                DTYPES[self.precision],
                self.config.lora,
                _roles(self.config),
                placed,
                self.facts.attention,
            )
            for placed in maps
        ]
        for backbone in made if self.checkpointing else []:
            backbone.recompute_layers()
        return made

    def _peak(self, trial: Callable[[ShapeBackbone], list[Peaks]], brought: int) -> Peaks:
        """Return the maximum of a trial's peaks, each extrapolated to full depth and the actual weights.

        Args:
            trial: trial of a phase; may consist of several consecutive steps.
            brought: bytes of streamed weights on the main device at a time.
        """
        # Transpose: for each step of the trial, its peaks on the shallow model and on each deeper one.
        found = zip(*(trial(backbone) for backbone in self.backbones), strict=True)
        return fullest(self._at_full_depth(first, deeper, brought) for first, *deeper in found)

    def _at_full_depth(self, first: Peaks, deeper: Sequence[Peaks], brought: int) -> Peaks:
        steps = [count / self.period - self.few for _, count in self.spans] if deeper else []
        found: Peaks = {}
        for device, size in self.placement.bytes.items():
            peak = at_depth(first.get(device, {}), [one.get(device, {}) for one in deeper], steps)
            peak["base"] = size + (brought if device == self.placement.main else 0)
            peak["activations"] += self.sizes.unpacked if computes(device, self.placement.main) else 0
            found[device] = self._with_process(device, peak)
        return found

    def _with_process(self, device: str, peak: Counter[str]) -> Counter[str]:
        """Add the process and its allocator's cached memory, on the CPU only."""
        if device != "cpu":
            return peak
        alive = sum(peak[kind] for kind in ("gradients", "kv_cache", "activations", "logits"))
        learning = peak["gradients"] > 0
        kept = kept_by_allocator(self.sizes.total, alive, learning=learning) if self.placement.main == "cpu" else 0
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

    def of_policy(self, rows: int) -> Peaks:
        """Return the peak of sampling `rows` replies at once in policy training."""
        policy, work = self.config.policy, self.work
        in_iteration = min(rows, policy.questions_per_iteration * policy.replies_per_question)
        prompts = min(in_iteration, policy.questions_per_iteration)

        def trial(backbone: ShapeBackbone) -> list[Peaks]:
            shape = Shape(in_iteration, work.reply_prompt, work.reply)
            peaks = rollout_peak(backbone, shape, prompts=prompts, nucleus=False, role=POLICY)
            add_optimizer(peaks, backbone, LEARNING)
            return [peaks]

        return self._peak(trial, self._matrix)

    def _of_base(self, shape: Shape, *, nucleus: bool) -> Peaks:
        """Return the peak of sampling from the bare base, one reply per prompt."""

        def trial(backbone: ShapeBackbone) -> list[Peaks]:
            peaks = rollout_peak(backbone, shape, prompts=shape.rows, nucleus=nucleus, role=BASE)
            for peak in peaks.values():
                peak["adapters"] = 0
            return [peaks]

        return self._peak(trial, self._matrix)

    def _rollout(self, rows: int) -> Peaks:
        """Return the highest peak of sampling `rows` replies at once.

        The candidates are policy training, the judge's chain of thought, and collecting replies.
        """
        work = self.work
        judging = self._of_base(Shape(rows, work.judge_prompt, work.working), nucleus=False)
        replying = self._of_base(Shape(rows, work.reply_prompt, work.reply), nucleus=True)
        return fullest([self.of_policy(rows), judging, replying])

    def _learning(self, rows: int) -> dict[str, Peaks]:
        """Return the peaks of scoring and updating with micro-batches of `rows` of the longest sequences."""
        policy, work = self.config.policy, self.work
        replies = policy.questions_per_iteration * policy.replies_per_question
        minibatch = min(policy.minibatch, replies)

        def score(backbone: ShapeBackbone) -> list[Peaks]:
            shape = Shape(min(rows, replies), work.reply_prompt, work.reply)
            peaks = score_peak(backbone, shape, grade_prompt=work.grade_prompt, replies=replies)
            add_optimizer(peaks, backbone, LEARNING)
            return [peaks]

        def update(backbone: ShapeBackbone) -> list[Peaks]:
            return update_peaks(
                backbone,
                Shape(min(rows, minibatch), work.reply_prompt, work.reply),
                grade_prompt=work.grade_prompt,
                minibatch=minibatch,
                replies=replies,
                evaluator_rows=min(max(2, rows - rows % 2), 2 * self.config.evaluator.batch),
            )

        return {"score": self._peak(score, self._matrix), "update": self._peak(update, self._layer)}


# -- the plan -------------------------------------------------------------------------------------------------------------


def make_plan(
    config: RunConfig,
    facts: ModelFacts,
    machine: Machine,
    *,
    work: Workload | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plan the memory of a run of one model under this configuration.

    Args:
        config: requested settings; `batch_tokens`, `rollout_rows` and `checkpointing` are kept if they fit.
        facts: facts of the model; no weight is loaded.
        machine: the devices and their free memory.
        work: Optional. Token counts. Default: the longest that the configuration allows.
        tell: called with a sentence before each step that may take seconds. Default: does nothing.

    Returns:
        The plan with the largest settings that fit, up to the requested ones. If nothing fits, the plan of one row at a time,
        with sentences about what would have to change.

    Raises:
        ModelError, ConfigError: a model that a run refuses, or adapters, a context or attention that it does not support.
    """
    facts = facts.within(config.context)
    tell(f"checking {facts.name}")
    _check_usable(config, facts)
    tell(f"placing the weights of {facts.name}")
    precision, placement, said = _place(config, facts, machine)
    work = work or workload(config, facts.context)
    found = _search(
        _Search(config, machine, tell),
        lambda checkpointing: Measured(facts, config, precision, placement, work, checkpointing, machine.runtime),
    )
    fits = found.fits and not any(s.startswith("does not fit") for s in said)
    measured = found.learned
    devices = tuple(_device_plans(placement, machine, found.phases))
    plan = Plan(facts.name, measured.sizes.numbers, precision, placement, devices, found.settings(config), vars(work), fits, ())
    changes = _adapted(config, plan) if fits else _refused(config, facts, plan, machine)
    return replace(plan, changes=(*said, *changes, *_with_bitsandbytes(config, facts, plan)))


def _check_usable(config: RunConfig, facts: ModelFacts) -> None:
    """Make the checks that a run makes before loading, before anything is measured.

    Raises:
        ModelError, ConfigError: the model cannot write several replies at once, or does not support these adapters.
    """
    check_state(facts)
    check_adapters(copy.deepcopy(facts.shell), config.lora, facts.name)


@dataclass(frozen=True)
class _Search:
    """Searches for the largest settings that fit on every device, up to the requested ones.

    Attributes:
        tell: called with a sentence before each measurement.
    """

    config: RunConfig
    machine: Machine
    tell: Callable[[str], None]

    def _missing(self, peaks: Peaks) -> int:
        """Return the bytes that the tightest device lacks; negative if everything fits."""
        budgets = {device: self.machine.budget(device) for device in peaks}
        return max((peaks[d].total() - b for d, b in budgets.items() if b is not None), default=-1)

    def replies(self, measured: Measured) -> int:
        """Return the number of replies sampled at once; 0 if not even one fits."""

        def misses(rows: int) -> int:
            self.tell(f"measuring {rows} replies side by side")
            return self._missing(measured.rollout(rows))

        return largest_fitting(misses, self.config.rollout_rows, 0)

    def rows(self, measured: Measured) -> int:
        """Return the rows of a micro-batch; 0 if not even one fits."""

        def misses(rows: int) -> int:
            how = "recomputed" if measured.checkpointing else "kept"
            self.tell(f"measuring micro-batches of {rows} rows, layers {how}")
            return max(self._missing(peaks) for peaks in measured.learning(rows).values())

        return largest_fitting(misses, _wanted_rows(self.config, measured.work), 0)


def _wanted_rows(config: RunConfig, work: Workload) -> int:
    return max(1, config.batch_tokens // work.longest)


@dataclass(frozen=True)
class _Found:
    """The settings found by the search.

    Attributes:
        sampled, learned: measurements of sampling, and of learning with activations kept or recomputed.
        replies, rows: replies sampled at once and rows of a micro-batch; 0 if not even one fits.
    """

    sampled: Measured
    learned: Measured
    replies: int
    rows: int

    @property
    def fits(self) -> bool:
        return self.replies > 0 and self.rows > 0

    @property
    def phases(self) -> dict[str, Peaks]:
        # Sampling has no backward pass, so checkpointing does not affect it: measure it once.
        rollout = self.sampled.rollout(max(1, self.replies))
        return {"load": self.learned.load(), "rollout": rollout, **self.learned.learning(max(1, self.rows))}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        work, rows = self.learned.work, max(1, self.rows)
        return {
            "batch_tokens": config.batch_tokens if self.rows == _wanted_rows(config, work) else rows * work.longest,
            "rollout_rows": max(1, self.replies),
            "checkpointing": self.learned.checkpointing,
            "micro_batch_rows": rows,
        }


def _search(search: _Search, measured_with: Callable[[bool], Measured]) -> _Found:
    """Search with activation checkpointing if it is configured, or if not even one row fits without it."""
    sampled = learned = measured_with(search.config.checkpointing)
    replies, rows = search.replies(sampled), search.rows(learned)
    if rows == 0 and not learned.checkpointing:
        learned = measured_with(True)
        rows = search.rows(learned)
    return _Found(sampled, learned, replies, rows)


def _device_plans(placement: DeviceMap, machine: Machine, phases: Mapping[str, Peaks]) -> list[DevicePlan]:
    """Return the memory use of each device, the main one first."""
    found = []
    for device in sorted(placement.bytes, key=lambda name: (name != placement.main, list(machine.memory).index(name))):
        layers = tuple(span for span, where in placement.spans() if where == device)
        kinds = {phase: phases[phase][device] for phase in PHASES}
        found.append(DevicePlan(device, layers, machine.budget(device), kinds))
    return found


_bytes = partial(format_bytes, digits=4)
"""Four digits, because the planner compares sizes that are close."""


def _adapted(config: RunConfig, plan: Plan) -> list[str]:
    """List the settings that were reduced, in the form in which to set them."""
    names = ("batch_tokens", "rollout_rows", "checkpointing")
    changed = {name: plan.settings[name] for name in names if plan.settings[name] != getattr(config, name)}
    if not changed:
        return []
    given = " ".join(f"--set {name}={str(value).lower()}" for name, value in changed.items())
    wanted = ", ".join(f"{name} {str(getattr(config, name)).lower()}" for name in changed)
    there = ", ".join(f"{_bytes(d.budget)} on {d.device}" for d in plan.devices if d.budget is not None)
    return [f"{there} is too little for {wanted}; give {given} (a run under way: --memory-budget instead)"]


def _refused(config: RunConfig, facts: ModelFacts, plan: Plan, machine: Machine) -> list[str]:
    """Explain why nothing fits, and what would have to change."""
    said = []
    for device in (d for d in plan.devices if d.over > 0):
        base = device.phases["load"]["base"]
        said.append(
            f"does not fit: {device.fullest} takes {_bytes(device.peak)} on {device.device} with one row at a time and layers "
            f"recomputed, of which the base is {_bytes(base)}; there are {_bytes(device.budget or 0)}"
        )
        said += _elsewhere(config, machine, device)
        said += _smaller(config, facts, plan, device) if len(plan.devices) == 1 else []
        if 0 < base < (device.budget or 0):
            said.append(
                f"shorter texts lower the {_bytes(device.peak - base)} beside the base (replies.max_new_tokens="
                f"{config.replies.max_new_tokens}, verdicts.max_new_tokens={config.verdicts.max_new_tokens} now)"
            )
    if plan.main.device != "cpu":
        said.append(f"device=cpu has {_bytes(machine.memory['cpu'])} of free memory")
    tight = max(plan.devices, key=lambda device: device.over)
    return [*said, f"or take {_bytes(tight.peak)} of memory on {tight.device}, or a smaller model"]


def _elsewhere(config: RunConfig, machine: Machine, device: DevicePlan) -> list[str]:
    """Suggest a larger reserve on this device, if its weights can move to another one."""
    others = list(machine.memory)[list(machine.memory).index(device.device) + 1 :]
    beside = device.peak - device.phases["load"]["base"]
    free = max(1, machine.weights[device.device])
    reserve = math.ceil(20 * beside / free) / 20
    if not others or config.placement.mode == "single" or not config.placement.reserve < reserve < 1:
        return []
    return [f"about placement.reserve={reserve:.2f} would move layers from {device.device} to {', '.join(others)}"]


def _smaller(config: RunConfig, facts: ModelFacts, plan: Plan, device: DevicePlan) -> Sequence[str]:
    """Estimate the memory use at lower precisions."""
    said, base = [], device.phases["load"]["base"]
    for precision in _precisions(config):
        saved = base - weigh(facts, precision).total
        if saved > 0 and precision != plan.precision:
            left = device.peak - saved
            verdict = "which fits" if left <= (device.budget or 0) else "which is not enough alone"
            said.append(f"precision={precision} takes about {_bytes(left)}, {verdict}")
    return said


def _with_bitsandbytes(config: RunConfig, facts: ModelFacts, plan: Plan) -> list[str]:
    """List quantised precisions that would help but were skipped because bitsandbytes is not installed."""
    device, is_tight = plan.main, not plan.fits or not plan.placement.is_whole
    if config.precision != "auto" or not is_tight or device.budget is None or is_bitsandbytes_available():
        return []
    beside = device.peak - device.phases[device.fullest].get("base", 0)
    said = []
    for precision in (name for name in _precisions(config) if PRECISIONS[name].quantised):
        takes = weigh(facts, precision).total + beside
        verdict = "which fits" if takes <= device.budget else "which is not enough alone"
        said.append(
            f"precision={precision} takes about {_bytes(takes)} on {device.device}, {verdict}; it needs bitsandbytes, which is "
            "not installed: pip install 'self-evaluator[quantised]'"
        )
    return said


def _precisions(config: RunConfig) -> list[str]:
    """Return the precisions that the configuration allows and the planner supports, largest first."""
    allowed: tuple[Any, ...] = get_args(type(config).model_fields["precision"].annotation)
    return [name for name in PRECISIONS if name in allowed and name != "fp16"]
