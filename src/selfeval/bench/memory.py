"""Peak memory of sampling, scoring and updating: measured in new processes, as `selfeval plan` says, and by Hugging Face.

All figures are bytes above the memory of the process before the model is loaded. Hugging Face's sampling and scoring are
measured with one copy of the weights each. Its update is computed, not measured: our peak, and further copies of the weights
for reference, evaluator and, for learners with a critic, critic.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from selfeval.backbone.load import pick_device
from selfeval.backbone.placement import meta_model, plan_placement
from selfeval.backbone.precision import DTYPES, pick_precision
from selfeval.bench.machine import describe_machine
from selfeval.bench.memory_worker import Job, Work
from selfeval.bench.step import LEARNERS, StepShape
from selfeval.bench.workloads import BenchOptions, bench_config, check_count, check_multiple
from selfeval.config import CriticConfig, RunConfig
from selfeval.errors import ConfigError, LoopError
from selfeval.planner.machine import Machine
from selfeval.planner.measurement import Measured
from selfeval.planner.model_configs import ModelFacts, model_facts, weigh
from selfeval.planner.workload import Workload

__all__ = ["MemoryResult", "PhaseMemory", "bench_memory"]

_ENDLESS = 1 << 40


@dataclass(frozen=True)
class PhaseMemory:
    """Peak memory of a phase in bytes.

    Attributes:
        phase: rollout, score or update.
        ours: measured.
        planned: as `selfeval plan` computes it.
        hugging_face: measured, or computed for the update.
        is_computed: whether the figure of Hugging Face is computed.
    """

    phase: str
    ours: int
    planned: int
    hugging_face: int
    is_computed: bool

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "planned_over_measured": self.planned / self.ours,
            "hugging_face_over_ours": self.hugging_face / self.ours,
        }


@dataclass(frozen=True)
class MemoryResult:
    """Peak memory of all phases.

    Attributes:
        model, precision, machine: what was measured, and where.
        workload: sizes of an iteration.
        weights: bytes of one copy of the weights.
        before: bytes of our process before the model was loaded.
        phases: rollout, score and update.
    """

    model: str
    precision: str
    machine: dict[str, Any]
    workload: dict[str, Any]
    weights: int
    before: int
    phases: tuple[PhaseMemory, ...]

    def as_json(self) -> dict[str, Any]:
        return {"command": "memory", **vars(self), "phases": [phase.as_json() for phase in self.phases]}


def bench_memory(
    options: BenchOptions,
    *,
    learner: str = "ppo",
    requests: int = 64,
    samples: int | None = None,
    prompt_tokens: int = 64,
    reply_tokens: int = 64,
    batch_size: int = 32,
    report_progress: Callable[[str], None] = lambda text: None,
) -> MemoryResult:
    """Measure memory.

    Args:
        options: model, device, precision and threads; the rounds are not used, because a peak hardly varies.
        learner: ppo, grpo or rloo.
        requests: number of replies of an iteration.
        samples: Optional. Replies per question, at least 2. Default: 8, or all if there are fewer requests.
        prompt_tokens, reply_tokens: tokens of each prompt and of each reply.
        batch_size: batch size of Hugging Face; ours are those of a run.
        report_progress: called with the current step. Default: does nothing.

    Raises:
        ConfigError: there is no such learner, a size is too small, or the texts exceed the model's context.
        LoopError: a process failed.
    """
    samples = min(8, requests) if samples is None else samples
    if learner not in LEARNERS:
        raise ConfigError(f"--learner {learner}: pass {', '.join(LEARNERS[:-1])} or {LEARNERS[-1]}")
    for option, value, lowest in (
        ("--requests", requests, 2),
        ("--samples", samples, 2),
        ("--prompt-tokens", prompt_tokens, 1),
        ("--reply-tokens", reply_tokens, 1),
        ("--batch-size", batch_size, 1),
    ):
        check_count(option, value, lowest)
    check_multiple(requests, samples)
    shape = StepShape(requests, samples, prompt_tokens, reply_tokens)
    config = bench_config(options, *_policy_settings(shape, learner))
    facts, precision = _facts(config, shape)
    report_progress("measuring an iteration of ours")
    ours = _in_process(Job("ours", options, shape, learner, batch_size))
    found: dict[str, int] = {}
    works: tuple[Work, ...] = ("rollout", "score")
    for work in works:
        report_progress(f"measuring the {work} of Hugging Face")
        found[work] = _in_process(Job(work, options, shape, learner, batch_size))["peaks"][work]
    report_progress("planning")
    device = pick_device(options.device)
    planned = _planned(config, facts, precision, shape, device)
    weights = weigh(facts, precision).total
    theirs: dict[str, int] = {**found, "update": ours["peaks"]["update"] + _further_copies(config) * weights}
    phases = tuple(
        PhaseMemory(phase, ours["peaks"][phase], planned[phase], theirs[phase], is_computed=phase == "update")
        for phase in ("rollout", "score", "update")
    )
    workload = {"learner": learner, **vars(shape), "batch_size": batch_size}
    return MemoryResult(facts.name, precision, describe_machine(device), workload, weights, ours["before"], phases)


def _policy_settings(shape: StepShape, learner: str) -> list[str]:
    return [
        f"policy.learner={learner}",
        f"policy.questions_per_iteration={shape.questions}",
        f"policy.replies_per_question={shape.replies}",
        f"policy.minibatch={shape.prompts}",
        f"policy.epochs={shape.epochs}",
    ]


def _facts(config: RunConfig, shape: StepShape) -> tuple[ModelFacts, str]:
    """Return the facts of the model, and the precision in which it will be loaded."""
    facts, target = model_facts(config.model), pick_device(config.backbone.device)
    longest = shape.prompt_tokens + shape.reply_tokens
    if facts.context is not None and longest > facts.context:
        raise ConfigError(
            f"a prompt and its reply have {longest} tokens, more than this model's context of {facts.context}; pass a smaller "
            "--prompt-tokens or --reply-tokens"
        )
    free = sum(size for name, size in Machine.of(config.backbone).memory.items() if name.startswith(target.type))
    precision, _ = pick_precision(config.backbone.precision, target, lambda name: weigh(facts, name).total, free)
    if precision not in DTYPES:
        raise ConfigError(f"{facts.name} fits only in {precision}; pass --precision {' or '.join(DTYPES)} or a smaller --model")
    return facts, precision


def _in_process(job: Job) -> dict[str, Any]:
    command = [sys.executable, "-m", "selfeval.bench.memory_worker", job.as_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise LoopError(f"the process that measures memory failed ({last}); pass smaller sizes, or free some memory")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _planned(config: RunConfig, facts: ModelFacts, precision: str, shape: StepShape, device: torch.device) -> dict[str, int]:
    """Return the planner's bytes by phase for the same work, without the runtime of the process."""
    name = "cuda:0" if device.type == "cuda" else "cpu"
    work = Workload(shape.prompt_tokens, shape.prompt_tokens, shape.prompt_tokens, shape.reply_tokens, 1)
    placement = plan_placement(meta_model(facts.config), {name: _ENDLESS}, precision)
    measured = Measured(facts, config, precision, placement, work, config.backbone.checkpointing, 0)
    peaks = {
        "rollout": measured.of_policy(config.backbone.rollout_batch_size),
        **measured.learning(max(1, min(shape.prompts, config.backbone.batch_tokens // work.longest))),
    }
    return {phase: sum(peak[name].values()) for phase, peak in peaks.items()}


def _further_copies(config: RunConfig) -> int:
    """Return the copies of the weights that separate models need and roles on one base do not.

    They are those of the reference, the evaluator and, for learners with a critic, the critic.
    """
    return 2 + issubclass(config.policy.spec.config, CriticConfig)
