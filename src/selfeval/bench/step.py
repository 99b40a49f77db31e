"""An iteration of policy learning: prompts read once for all replies, prompts read with each reply, and the limit.

The limit is the time of the same number of plain passes of the model, without adapters, over prompts once and replies: forward
for the rollout, the reference, the evaluator and the critic's values, forward and backward for each role and epoch. Replies
have the same length, because the end token is off, and evaluator and critic read the policy's prompt.

`benchmarks/step.py` measures the same and TRL, in a process per side.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selfeval.backbone.body import text_body
from selfeval.backbone.roles import Backbone
from selfeval.bench.hugging_face import load_causal
from selfeval.bench.timing import Comparison, Seconds, Side, take_turns, timed
from selfeval.bench.workloads import (
    BenchOptions,
    BenchResult,
    add_random_role,
    bench_config,
    check_count,
    check_multiple,
    load_backbone,
    measure_on,
    own_threads,
)
from selfeval.config import CriticConfig, PolicyConfig
from selfeval.errors import ConfigError
from selfeval.prompt import Prompt
from selfeval.training.context import POLICY, REFERENCE, LearnerContext, QuestionPrompts
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.policy import train_policy
from selfeval.training.recorder import CheckpointRecorder
from selfeval.training.scoring import EvaluatorScorer
from selfeval.training.watchdogs import Alarm

__all__ = [
    "LEARNERS",
    "Iterations",
    "SeparateRows",
    "StepShape",
    "bench_step",
    "limit_seconds",
    "run_iterations",
    "step_prompts",
]

LEARNERS = ("ppo", "grpo", "rloo")


class SeparateRows(Backbone):
    """A backbone whose passes read the prompt with each reply."""

    def shares_prefixes(self, longest: int) -> bool:
        return False


@dataclass(frozen=True)
class StepShape:
    """Sizes of an iteration.

    Attributes:
        prompts: prompts counted once per reply, which is the number of replies.
        replies: replies per question.
        prompt_tokens, reply_tokens: tokens of each prompt and of each reply.
        epochs: epochs of one minibatch.
        iterations: iterations that are run; the first one is left out of the times.
        rank: rank of the adapters, for callers that make the backbone.
    """

    prompts: int
    replies: int
    prompt_tokens: int
    reply_tokens: int
    epochs: int = 2
    iterations: int = 2
    rank: int = 16

    @property
    def questions(self) -> int:
        return self.prompts // self.replies


@dataclass
class Iterations:
    """The measurements of `run_iterations`: the time of each iteration but the first, and the metrics of each."""

    seconds: list[Seconds] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)


def step_prompts(shape: StepShape) -> list[list[int]]:
    """Return one prompt per reply; the replies to a question are neighbours."""
    distinct = [[5 + (i * 7 + j) % 400 for j in range(shape.prompt_tokens)] for i in range(shape.questions)]
    return [prompt for prompt in distinct for _ in range(shape.replies)]


class _Clock(CheckpointRecorder):
    """Notes the time at the end of every iteration, and its metrics."""

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        super().__init__(folder, backbone)
        self.ends: list[Seconds] = []
        self.values: list[dict[str, float]] = []

    def metrics(self, values: dict[str, float], alarms: Sequence[Alarm]) -> None:
        if self.backbone.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.loaded.device)
        self.ends.append(Seconds(time.process_time(), time.perf_counter()))
        self.values.append(dict(values))


def run_iterations(backbone: Backbone, shape: StepShape, learner: str, *, batch_tokens: int = 1 << 20) -> Iterations:
    """Train a new policy for some iterations.

    Args:
        backbone: its roles are replaced, and replies no longer end by themselves.
        shape: sizes of an iteration.
        learner: one of `LEARNERS`.
        batch_tokens: maximum tokens of a micro-batch. Default: large enough for the whole minibatch.
    """
    for role in backbone.roles.names:
        backbone.roles.remove(role)
    backbone.loaded.eos_ids = ()
    # A random head, because equal scores would leave rounding errors as the only gradient, which Adam scales up.
    add_random_role(backbone, EVALUATOR, head=True)
    backbone.roles.add(POLICY)
    backbone.roles.add_snapshot(REFERENCE, of=POLICY)
    config = PolicyConfig(
        learner=learner,
        iterations=shape.iterations,
        questions_per_iteration=shape.questions,
        replies_per_question=shape.replies,
        epochs=shape.epochs,
        minibatch=shape.prompts,
        checkpoint_every=1000,
    )
    context = LearnerContext(
        backbone,
        config,
        EvaluatorScorer(backbone, batch_tokens),
        seed=0,
        limit=shape.reply_tokens,
        batch_size=shape.prompts,
        batch_tokens=batch_tokens,
        evaluator=EVALUATOR,
    )
    asked = [Prompt(tuple(ids)) for ids in step_prompts(shape)[:: shape.replies]]
    questions = [QuestionPrompts(str(i), prompt, prompt) for i, prompt in enumerate(asked)]
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock(Path(folder), backbone)
        train_policy(context, questions, clock)
    seconds = [Seconds(b.cpu - a.cpu, b.wall - a.wall) for a, b in itertools.pairwise(clock.ends)]
    return Iterations(seconds, clock.values)


def limit_seconds(model: Any, shape: StepShape, learner: str) -> Seconds:
    """Return the time of the passes of an iteration.

    Args:
        model: causal model of transformers, frozen and without adapters.
        shape: sizes of an iteration.
        learner: one of `LEARNERS`; those with a critic have its passes as well.
    """
    width = shape.prompt_tokens + shape.replies * shape.reply_tokens
    ids = torch.arange(5, 5 + shape.questions * width, device=model.device).view(shape.questions, width)
    embedded = model.get_input_embeddings()(ids % model.get_input_embeddings().weight.shape[0]).detach()
    body, critics = text_body(model), issubclass(PolicyConfig(learner=learner).spec.config, CriticConfig)

    def forward() -> None:
        with torch.no_grad():
            body(inputs_embeds=embedded, use_cache=False)

    def backward() -> None:
        inputs = embedded.clone().requires_grad_(True)
        body(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()

    def passes() -> None:
        for _ in range(3 + critics):
            forward()
        for _ in range(shape.epochs * (1 + critics)):
            backward()

    return timed(passes, model.device)


def bench_step(
    options: BenchOptions,
    *,
    learner: str = "ppo",
    requests: int = 128,
    samples: int | None = None,
    prompt_tokens: int = 64,
    reply_tokens: int = 64,
    report_progress: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure an iteration of policy learning.

    Args:
        options: model, device, precision, threads and rounds.
        learner: ppo, grpo or rloo.
        requests: number of replies.
        samples: Optional. Replies per question, at least 2. Default: 8, or all if there are fewer requests.
        prompt_tokens, reply_tokens: tokens of each prompt and of each reply.
        report_progress: called with the current step. Default: does nothing.

    Raises:
        ConfigError: there is no such learner, a size is too small, or the texts exceed the model's context.
    """
    samples = min(8, requests) if samples is None else samples
    if learner not in LEARNERS:
        raise ConfigError(f"--learner {learner}: pass {', '.join(LEARNERS[:-1])} or {LEARNERS[-1]}")
    for option, value, lowest in (
        ("--rounds", options.rounds, 1),
        ("--requests", requests, 2),
        ("--samples", samples, 2),
        ("--prompt-tokens", prompt_tokens, 1),
        ("--reply-tokens", reply_tokens, 1),
    ):
        check_count(option, value, lowest)
    check_multiple(requests, samples)
    config, trusted = bench_config(options), options.trust_remote_code
    report_progress(f"loading {config.model}")
    shared = load_backbone(config, trust_remote_code=trusted)
    _check_context(shared, prompt_tokens + reply_tokens)
    separate = load_backbone(config, trust_remote_code=trusted, kind=SeparateRows)
    model, device = load_causal(config, shared, trust_remote_code=trusted), shared.loaded.device
    shape = StepShape(requests, samples, prompt_tokens, reply_tokens, rank=config.backbone.lora.rank)
    found: dict[str, Iterations] = {}

    def iteration(name: str, backbone: Backbone) -> Seconds:
        found[name] = run_iterations(backbone, shape, learner, batch_tokens=config.backbone.batch_tokens)
        return found[name].seconds[-1]

    def limit() -> Seconds:
        limit_seconds(model, shape, learner)  # as the first iteration of the others, it is left out
        return limit_seconds(model, shape, learner)

    sides = [
        Side("ours", "prompts read once", partial(iteration, "shared", shared)),
        Side("separate", "prompts read with each reply", partial(iteration, "separate", separate)),
        Side("limit", "plain passes", limit),
    ]
    with own_threads(options):
        times = take_turns(sides, options.rounds, report_progress, warm_up=False)
        units = shape.prompts * shape.reply_tokens
        table = Comparison(f"an iteration of {learner.upper()}", "reply tokens", units, measure_on(device), times)
        workload = {"learner": learner, **vars(shape), "reply_tokens_of_all": units}
        return BenchResult.of("step", shared, workload, [table], _agreement(found, shared, prompt_tokens + reply_tokens))


def _check_context(backbone: Backbone, longest: int) -> None:
    context = backbone.loaded.context_length
    if context is not None and longest > context:
        raise ConfigError(
            f"a prompt and its reply have {longest} tokens, more than this model's context of {context}; pass a smaller "
            "--prompt-tokens or --reply-tokens"
        )


def _agreement(found: dict[str, Iterations], backbone: Backbone, longest: int) -> dict[str, Any]:
    """Return whether prompts were shared, and how far the metrics of the first iteration differ from those of separate rows."""
    ours, separate = (found[name].metrics[0] for name in ("shared", "separate"))
    # Times differ, and NaN marks a metric that has no value.
    names = [n for n in ours if "second" not in n and n in separate and not math.isnan(ours[n])]
    differences = {name: abs(ours[name] - separate[name]) / max(1.0, abs(separate[name])) for name in names}
    largest = max(differences, key=lambda name: differences[name])
    return {
        "prompts_shared": backbone.shares_prefixes(longest),
        "metrics": {"compared": len(names), "largest_difference": differences[largest], "of": largest},
    }
