"""Costs of one worker on this machine, with the embedded model and one thread, in CPU seconds, and the sizes of messages.

Every cost per token is a slope between two sizes, and the rest is what a pass costs whatever its size.
"""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from selfeval.backbone.logprobs import token_logprobs
from selfeval.backbone.roles import Backbone
from selfeval.backbone.sequences import pad_sequences, reply_hidden, reply_logprobs
from selfeval.config import RunConfig
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.templates import Templates, templates_folder
from selfeval.planner.stage_times import Lengths, probe_speed
from selfeval.prompt import Prompt
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request, Rollout
from selfeval.stages.seeds import seeds_of
from selfeval.training.checkpoint import role_optimizer
from selfeval.training.gradient_accumulation import add_gradients, clip_gradients

ROLE = "probe"
_ROUNDS = 3
_STEPS = (2, 10)
_ROWS = (8, 128)
_SEQUENCES = (2, 32)


@dataclass(frozen=True)
class Measured:
    """The costs that `scale_work.Costs` needs, and sizes.

    Attributes:
        bytes_per_token: of a gathered reply, pickled.
        handled: of a reply that is received, per token.
        adapter: trained weights of an adapter.
        lengths: of the texts of the embedded domain.
    """

    step: float
    row: float
    reading: float
    read: float
    learning: float
    learn: float
    optimizer: float
    start: float
    handled: float
    bytes_per_token: float
    adapter: int
    lengths: Lengths

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(config: RunConfig) -> Measured:
    """Measure all costs."""
    torch.set_num_threads(1)
    backbone = Backbone.load(config.model, config.backbone)
    templates = _templates(backbone, config)
    lengths = probe_speed(backbone, templates, config).lengths
    backbone.roles.add(ROLE)
    prompts = [templates.prompt("reply", question=seed.question) for seed in seeds_of(config, None)]
    prompts = [prompts[i % len(prompts)] for i in range(max(_ROWS))]
    with backbone.acting_as(ROLE):
        step, row = _decoding(backbone, prompts)
        rollouts = _sample(backbone, prompts, config.replies.longest)
        reading, read = _line(lambda n: _read(backbone, prompts, rollouts, n), _tokens(prompts, rollouts))
        learning, learn = _line(lambda n: _learn(backbone, prompts, rollouts, n), _tokens(prompts, rollouts))
    handled, size = _message(rollouts)
    return Measured(
        *(step, row, reading, read, learning, learn),
        optimizer=_optimizer(backbone),
        start=_start(config.model),
        handled=handled,
        bytes_per_token=size,
        adapter=sum(p.numel() for p in backbone.roles.parameters(ROLE).values()),
        lengths=lengths,
    )


def _templates(backbone: Backbone, config: RunConfig) -> Templates:
    folder = templates_folder(config.model, config.templates)
    return Templates.load(folder, backbone.loaded.tokenizer, kinds=kinds_of_run(config.verdicts))


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of some work, the least of several rounds: other jobs only add to it."""
    work()
    found = []
    for _ in range(_ROUNDS):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def _line(work: Callable[[int], Any], sizes: Callable[[int], float]) -> tuple[float, float]:
    """Return intercept and slope of the CPU seconds of work on few and on many sequences."""
    (few, many), (small, large) = _SEQUENCES, [cpu_seconds(lambda count=count: work(count)) for count in _SEQUENCES]
    slope = (large - small) / (sizes(many) - sizes(few))
    return max(0.0, small - slope * sizes(few)), slope


def _sample(backbone: Backbone, prompts: Sequence[Prompt], limit: int) -> list[Rollout]:
    requests = [Request(prompt) for prompt in prompts]
    return generate(backbone, requests, max_new_tokens=limit, seed=0, batch_size=len(prompts))


def _decoding(backbone: Backbone, prompts: Sequence[Prompt]) -> tuple[float, float]:
    """Return the CPU seconds of a decoding step, and of a row in it: no reply ends in so few steps."""
    first, last = _STEPS
    steps = []
    for rows in _ROWS:
        short, long = (cpu_seconds(lambda n=n, rows=rows: _sample(backbone, prompts[:rows], n)) for n in _STEPS)
        steps.append((long - short) / (last - first))
    row = (steps[1] - steps[0]) / (_ROWS[1] - _ROWS[0])
    return steps[0] - _ROWS[0] * row, row


def _tokens(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Callable[[int], float]:
    return lambda count: sum(len(p.ids) + len(r.ids) for p, r in zip(prompts[:count], rollouts[:count], strict=True))


def _read(backbone: Backbone, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], count: int) -> None:
    reply_logprobs(backbone, prompts[:count], [r.ids for r in rollouts[:count]], batch_tokens=16384)


def _learn(backbone: Backbone, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], count: int) -> None:
    batch = pad_sequences(backbone, prompts[:count], [r.ids for r in rollouts[:count]])
    found = token_logprobs(backbone, reply_hidden(backbone, batch), batch.reply_BR, batch.mask_BR)
    add_gradients(-found.logprobs.sum(), list(backbone.roles.parameters(ROLE).values()))


def _optimizer(backbone: Backbone) -> float:
    parameters = backbone.roles.parameters(ROLE)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer = role_optimizer(parameters, 1e-3)

    def step() -> None:
        clip_gradients(parameters, 1.0)
        optimizer.step()

    return cpu_seconds(step)


def _message(rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """Return the CPU seconds per token to send and receive replies, and the bytes per token."""
    tokens = sum(len(rollout.ids) for rollout in rollouts)
    sent = pickle.dumps(list(rollouts), pickle.HIGHEST_PROTOCOL)
    return cpu_seconds(lambda: [pickle.loads(sent) for _ in range(100)]) / 100 / tokens, len(sent) / tokens


def _start(model: str) -> float:
    """Return the CPU seconds of a process that loads the model."""
    code = (
        "import sys\n"
        "from selfeval.backbone.roles import Backbone\n"
        "from selfeval.config import BackboneConfig\n"
        "Backbone.load(sys.argv[1], BackboneConfig())\n"
    )
    found = []
    for _ in range(2):
        before = psutil.Process().cpu_times()
        subprocess.run([sys.executable, "-c", code, model], check=True)
        after = psutil.Process().cpu_times()
        found.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return statistics.median(found)
