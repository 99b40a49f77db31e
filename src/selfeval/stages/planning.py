"""plan: what a run will take in memory, before anything is loaded, and the settings with which it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, get_args

import torch

from selfeval.backbone.adapters import BASE
from selfeval.backbone.facts import ModelFacts
from selfeval.backbone.footprint import ShapeBackbone
from selfeval.backbone.placement import free_memory
from selfeval.backbone.plan import DTYPES, Plan, Weights, at_depth, largest_fitting, weigh
from selfeval.backbone.precision import pick_precision
from selfeval.config import RunConfig
from selfeval.judging.templates import template_texts, templates_folder
from selfeval.stages.context import START
from selfeval.training.phases import (
    LEARNING,
    POLICY_ROLES,
    Shape,
    optimizer_bytes,
    rollout_peak,
    score_peak,
    update_peak,
)
from selfeval.training.setting import POLICY, REFERENCE

__all__ = ["Workload", "free_on", "make_plan", "planned_device", "planned_precision", "workload"]

_CHARACTERS_PER_TOKEN = 3
_CHAT_TOKENS = 16
"""What a chat template adds around a message, about."""


@dataclass(frozen=True)
class Workload:
    """Tokens of the longest texts that the configuration allows, and how many lie side by side.

    Attributes:
        reply_prompt, grade_prompt, judge_prompt: tokens before a reply, as policy, evaluator and judge read it.
        reply, working: token limits of a reply and of the judge's working.
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
    """The largest workload that the limits allow; texts of templates are counted at three characters a token."""
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


def planned_device(config: RunConfig) -> str:
    """`cuda` or `cpu`: what the configuration says, else what there is."""
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def planned_precision(config: RunConfig, device: str, facts: ModelFacts, budget: int | None) -> str:
    """What loading will pick for a base of that size, on that device, with so much memory."""
    weights = None if budget is None else weigh(facts, "bf16").parameters
    return pick_precision(config.precision, torch.device(device), weights, budget or 0)[0]


def free_on(device: str) -> int | None:
    """Free memory of the device now; None for a card that is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    return free_memory(torch.device(device))["cuda:0" if device == "cuda" else "cpu"]


def _roles(config: RunConfig) -> dict[str, bool]:
    """The adapters in memory while the policy learns; later rounds hold what it starts from, and a copy as its reference."""
    return POLICY_ROLES | ({START: False, REFERENCE: False} if config.rounds > 1 else {})


class _Measured:
    """Peaks of the phases of one model, by running them on shapes of two of its depths.

    Args:
        checkpointing: layers are recomputed in the backward pass.
    """

    def __init__(self, facts: ModelFacts, config: RunConfig, precision: str, work: Workload, checkpointing: bool) -> None:
        self.facts, self.config, self.precision, self.work = facts, config, precision, work
        self.checkpointing = checkpointing
        period = facts.period
        whole = period is None or 3 * period >= facts.layers
        self.depths: tuple[int, ...] = (facts.layers,) if whole else (2 * (period or 1), 3 * (period or 1))
        self.rollout, self.learning = cache(self._rollout), cache(self._learning)

    @cached_property
    def weights(self) -> Weights:
        return weigh(self.facts, self.precision)

    @cached_property
    def backbones(self) -> list[ShapeBackbone]:
        made = [
            ShapeBackbone(self.facts.with_layers(depth), DTYPES[self.precision], self.config.lora, _roles(self.config))
            for depth in self.depths
        ]
        for backbone in made if self.checkpointing else []:
            backbone.recompute_layers()
        return made

    def _peak(self, trial: Callable[[ShapeBackbone], Counter[str]]) -> Counter[str]:
        """A trial's peak at full depth, on the weights as they lie in memory."""
        found = [trial(backbone) for backbone in self.backbones]
        peak = (
            found[0] if len(found) == 1 else at_depth(found[0], found[1], (self.depths[0], self.depths[1]), self.facts.layers)
        )
        peak["base"] = self.weights.bytes
        peak["activations"] += self.weights.unpacked
        return peak

    def _rollout(self, rows: int) -> Counter[str]:
        """Sampling `rows` side by side: policy iterations, and the judge's working, whichever is more."""
        policy, work = self.config.policy, self.work
        in_iteration = min(rows, policy.questions_per_iteration * policy.replies_per_question)
        prompts = min(in_iteration, policy.questions_per_iteration)

        def of_policy(backbone: ShapeBackbone) -> Counter[str]:
            shape = Shape(in_iteration, work.reply_prompt, work.reply)
            peak = rollout_peak(backbone, shape, prompts=prompts, nucleus=False, role=POLICY)
            peak["optimizer"] = optimizer_bytes(backbone, LEARNING)
            return peak

        def alone(shape: Shape, nucleus: bool) -> Callable[[ShapeBackbone], Counter[str]]:
            def trial(backbone: ShapeBackbone) -> Counter[str]:
                peak = rollout_peak(backbone, shape, prompts=shape.rows, nucleus=nucleus, role=BASE)
                peak["adapters"] = 0
                return peak

            return trial

        judging = alone(Shape(rows, work.judge_prompt, work.working), False)
        replying = alone(Shape(rows, work.reply_prompt, work.reply), True)
        return max((self._peak(trial) for trial in (of_policy, judging, replying)), key=lambda peak: peak.total())

    def _learning(self, rows: int) -> dict[str, Counter[str]]:
        """Scoring and updating with micro-batches of `rows` of the longest sequences."""
        policy, work = self.config.policy, self.work
        replies = policy.questions_per_iteration * policy.replies_per_question
        minibatch = min(policy.minibatch, replies)

        def score(backbone: ShapeBackbone) -> Counter[str]:
            shape = Shape(min(rows, replies), work.reply_prompt, work.reply)
            peak = score_peak(backbone, shape, grade_prompt=work.grade_prompt, replies=replies)
            peak["optimizer"] = optimizer_bytes(backbone, LEARNING)
            return peak

        def update(backbone: ShapeBackbone) -> Counter[str]:
            return update_peak(
                backbone,
                Shape(min(rows, minibatch), work.reply_prompt, work.reply),
                grade_prompt=work.grade_prompt,
                minibatch=minibatch,
                replies=replies,
                evaluator_rows=min(max(2, rows - rows % 2), 2 * self.config.evaluator.batch),
            )

        return {"score": self._peak(score), "update": self._peak(update)}

    def rollout_bytes(self, rows: int) -> int:
        return self.rollout(rows).total()

    def learning_bytes(self, rows: int) -> int:
        return max(peak.total() for peak in self.learning(rows).values())


def make_plan(config: RunConfig, facts: ModelFacts, budget: int | None, *, work: Workload | None = None) -> Plan:
    """Plans a run of `facts`' model under this configuration.

    Args:
        config: what is wanted; its `batch_tokens`, `rollout_rows` and `checkpointing` are kept where they fit.
        facts: of the model; nothing of it is loaded.
        budget: bytes that may be taken on the device, None for no limit.
        work: tokens; by default the longest that the configuration allows.

    Returns:
        The plan with the largest settings up to the wanted ones that fit. Where nothing fits, the plan of one row at a time
        and sentences about what would have to change.
    """
    device = planned_device(config)
    precision = planned_precision(config, device, facts, budget)
    work = work or workload(config, facts.context)
    measured = _Measured(facts, config, precision, work, config.checkpointing)
    wanted = max(1, config.batch_tokens // work.longest)
    sampling = largest_fitting(measured.rollout_bytes, config.rollout_rows, budget)
    learning = largest_fitting(measured.learning_bytes, wanted, budget)
    checkpointing = config.checkpointing
    if learning == 0 and not checkpointing:
        measured, checkpointing = _Measured(facts, config, precision, work, True), True
        learning = largest_fitting(measured.learning_bytes, wanted, budget)
    fits = sampling > 0 and learning > 0
    phases: dict[str, Mapping[str, int]] = {"load": Counter(base=measured.weights.bytes)}
    phases |= {"rollout": measured.rollout(max(1, sampling)), **measured.learning(max(1, learning))}
    settings = {
        "batch_tokens": config.batch_tokens if learning == wanted else max(1, learning) * work.longest,
        "rollout_rows": max(1, sampling),
        "checkpointing": checkpointing,
        "micro_batch_rows": max(1, learning),
    }
    plan = Plan(facts.name, measured.weights.parameters, precision, device, budget, phases, settings, vars(work), fits, ())
    changes = _adapted(config, plan) if fits else _refused(config, facts, plan)
    return Plan(**{**vars(plan), "changes": tuple(changes)})


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _adapted(config: RunConfig, plan: Plan) -> list[str]:
    """What was made smaller, as settings to give."""
    names = ("batch_tokens", "rollout_rows", "checkpointing")
    changed = {name: plan.settings[name] for name in names if plan.settings[name] != getattr(config, name)}
    if not changed:
        return []
    given = " ".join(f"--set {name}={str(value).lower()}" for name, value in changed.items())
    wanted = ", ".join(f"{name} {str(getattr(config, name)).lower()}" for name in changed)
    return [f"{_gib(plan.budget or 0)} is too little for {wanted}; give {given} (a run under way: --memory-budget instead)"]


def _refused(config: RunConfig, facts: ModelFacts, plan: Plan) -> list[str]:
    """Why nothing fits, and what would have to change."""
    budget = plan.budget or 0
    phase = max(plan.phases, key=plan.total)
    said = [
        f"does not fit: {phase} takes {_gib(plan.total(phase))} with one row at a time and layers recomputed, "
        f"of which the base is {_gib(plan.phases['load']['base'])}; there are {_gib(budget)}"
    ]
    smaller = [(p, saved) for p in _precisions(config) if (saved := plan.phases["load"]["base"] - weigh(facts, p).bytes) > 0]
    for precision, saved in smaller:
        left = plan.peak - saved
        verdict = "which fits" if left <= budget else "which is not enough alone"
        said.append(f"precision={precision} takes about {_gib(left)}, {verdict}")
    beside = plan.peak - plan.phases["load"]["base"]
    if beside > 0 and plan.phases["load"]["base"] < budget:
        lengths = (
            f"replies.max_new_tokens={config.replies.max_new_tokens}, verdicts.max_new_tokens={config.verdicts.max_new_tokens}"
        )
        said.append(f"shorter texts lower the {_gib(beside)} beside the base ({lengths} now)")
    if plan.device == "cuda":
        free = free_on("cpu") or 0
        said.append(f"device=cpu has {_gib(free)} of free memory")
    said.append(f"or take {_gib(plan.peak)} of memory, or a smaller model")
    return said


def _precisions(config: RunConfig) -> list[str]:
    """Precisions that the configuration allows and the plan knows, largest first."""
    allowed: tuple[Any, ...] = get_args(type(config).model_fields["precision"].annotation)
    return [name for name in DTYPES if name in allowed and name != "fp16"]
