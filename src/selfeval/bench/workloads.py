"""The model under measurement, and texts of random tokens whose lengths are spread as those of real texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from selfeval.backbone.precision import DTYPES
from selfeval.backbone.roles import Backbone
from selfeval.backbone.threads import cpu_threads, is_set_by_user, pick_threads, usable_cores
from selfeval.bench.machine import describe_machine
from selfeval.bench.timing import Comparison, Measure
from selfeval.config import RunConfig
from selfeval.errors import ConfigError
from selfeval.prompt import Prompt
from selfeval.stages.running import new_config

__all__ = [
    "BenchOptions",
    "BenchResult",
    "Replies",
    "add_random_role",
    "bench_config",
    "check_count",
    "check_multiple",
    "load_backbone",
    "measure_on",
    "own_threads",
    "random_ids",
    "replies_to",
    "spread_lengths",
]

_SPREAD, _SHORTEST, _LONGEST = 0.5, 4, 3
"""Standard deviation of the logarithm of a length; lengths are clipped to a fourth and three times the mean."""


@dataclass(frozen=True)
class BenchOptions:
    """Options that all measurements share.

    Attributes:
        model: Optional. Model folder or hub id. Default: the model that comes with the package.
        device: auto, cpu or cuda.
        precision: auto, fp32, bf16 or fp16.
        threads: CPU threads of torch; 0 takes as many as a run would.
        rounds: rounds that count.
        trust_remote_code: run code that comes with the model.
    """

    model: str | None = None
    device: str = "auto"
    precision: str = "auto"
    threads: int = 0
    rounds: int = 3
    trust_remote_code: bool = False


@dataclass(frozen=True)
class BenchResult:
    """The measurements of a command.

    Attributes:
        command: name of the measurement.
        model: name of the model.
        precision: precision of its weights.
        machine: processor, threads, versions.
        workload: sizes of the work, as counted.
        comparisons: one table each.
        checks: whether the sides computed the same.
    """

    command: str
    model: str
    precision: str
    machine: dict[str, Any]
    workload: dict[str, Any]
    comparisons: tuple[Comparison, ...]
    checks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        command: str,
        backbone: Backbone,
        workload: dict[str, Any],
        comparisons: Sequence[Comparison],
        checks: dict[str, Any] | None = None,
    ) -> BenchResult:
        """Return the result of a measurement with this backbone, on this machine."""
        machine = describe_machine(backbone.loaded.device)
        return cls(command, backbone.base_name, backbone.loaded.precision, machine, workload, tuple(comparisons), checks or {})

    def as_json(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "model": self.model,
            "precision": self.precision,
            "machine": self.machine,
            "workload": self.workload,
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "checks": self.checks,
        }


def bench_config(options: BenchOptions, *assignments: str) -> RunConfig:
    """Return the configuration of a run of this model, whose batch sizes the measurement uses.

    Raises:
        ConfigError: a value is wrong, or the precision is one that transformers cannot load alike.
    """
    if options.precision not in ("auto", *DTYPES):
        raise ConfigError(
            f"--precision {options.precision}: pass auto, {', '.join(DTYPES)}; weights in other precisions are not compared "
            "with Hugging Face"
        )
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {options.device}: pass auto, cpu or cuda")
    settings = [f"backbone.device={options.device}", f"backbone.precision={options.precision}", *assignments]
    return new_config(model=options.model, assignments=settings, trust_remote_code=options.trust_remote_code)


def load_backbone(config: RunConfig, *, trust_remote_code: bool = False, kind: type[Backbone] = Backbone) -> Backbone:
    """Load the model; it must be in plain weights on one device, as Hugging Face's side will be.

    Args:
        config: names the model, and has the settings of its backbone.
        trust_remote_code: run code that comes with the model. Default: False.
        kind: class of the backbone. Default: the one of a run.

    Raises:
        ConfigError: the model was quantised or spread over several devices.
    """
    backbone = kind.load(config.model, config.backbone, trust_remote_code=trust_remote_code)
    loaded = backbone.loaded
    if loaded.precision not in DTYPES:
        raise ConfigError(
            f"{backbone.base_name} was loaded in {loaded.precision}, which is not compared with Hugging Face; pass --precision "
            f"{' or '.join(DTYPES)}, or a smaller --model"
        )
    if loaded.placement is not None and not loaded.placement.is_whole:
        raise ConfigError(
            f"{backbone.base_name} does not fit on one device ({loaded.placement.sentence()}); pass a smaller --model, or "
            "--precision bf16"
        )
    return backbone


@contextmanager
def own_threads(options: BenchOptions) -> Iterator[None]:
    """Compute with the threads that were asked for; with 0, as a stage of a run does."""
    number = options.threads
    if number == 0:
        number = torch.get_num_threads() if is_set_by_user() else pick_threads(usable_cores())
    with cpu_threads(number):
        yield


def measure_on(device: torch.device) -> Measure:
    """Return the seconds that count: CPU time, which other jobs affect little, and wall time on a GPU."""
    return "cpu" if device.type == "cpu" else "wall"


def check_count(option: str, value: int, lowest: int = 1) -> None:
    """Refuse a number that is too small.

    Raises:
        ConfigError: it is.
    """
    if value < lowest:
        raise ConfigError(f"{option} {value}: pass {lowest} or more")


def check_multiple(requests: int, samples: int) -> None:
    """Refuse replies that are not the same number per prompt.

    Raises:
        ConfigError: the number of replies is not a multiple of those per prompt.
    """
    if requests % samples:
        more = samples * -(-requests // samples)
        fewer = max(count for count in range(1, samples + 1) if requests % count == 0)
        raise ConfigError(
            f"--requests {requests} is not a multiple of --samples {samples}; pass --requests {more} or --samples {fewer}"
        )


def spread_lengths(mean: int, count: int, seed: int) -> list[int]:
    """Draw lengths from a log-normal distribution with this mean, clipped to a fourth and three times of it.

    Example:
        >>> lengths = spread_lengths(20, 1000, seed=0)
        >>> min(lengths) >= 5, max(lengths) <= 60, 17 < sum(lengths) / 1000 < 23
        (True, True, True)
    """
    rng = random.Random(f"{seed}/lengths")
    # The mean of exp(N(mu, s^2)) is exp(mu + s^2 / 2).
    drawn = (mean * rng.lognormvariate(-(_SPREAD**2) / 2, _SPREAD) for _ in range(count))
    return [max(1, round(min(max(length, mean / _SHORTEST), mean * _LONGEST))) for length in drawn]


def random_ids(backbone: Backbone, length: int, rng: random.Random) -> tuple[int, ...]:
    """Return random tokens of the vocabulary, without control tokens."""
    tokenizer, loaded = backbone.loaded.tokenizer, backbone.loaded
    size = min(len(tokenizer), loaded.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    refused = {*tokenizer.all_special_ids, *loaded.eos_ids, loaded.pad_id}
    found: list[int] = []
    while len(found) < length:
        found += [token for token in (rng.randrange(size) for _ in range(length - len(found))) if token not in refused]
    return tuple(found)


@dataclass(frozen=True)
class Replies:
    """Replies of forced lengths: neighbouring ones have the same prompt.

    Attributes:
        prompts: one per reply.
        lengths: tokens of each reply.
        samples: replies per prompt.
    """

    prompts: tuple[Prompt, ...]
    lengths: tuple[int, ...]
    samples: int

    @property
    def distinct(self) -> tuple[Prompt, ...]:
        """The prompts, each once."""
        return self.prompts[:: self.samples]

    @property
    def written(self) -> int:
        """Tokens of all replies."""
        return sum(self.lengths)

    @property
    def read(self) -> int:
        """Tokens of the prompts, each read once."""
        return sum(len(prompt.ids) for prompt in self.distinct)

    @property
    def width(self) -> int:
        """Mean tokens of a prompt with its reply."""
        return max(2, round(sum(len(p.ids) + n for p, n in zip(self.prompts, self.lengths, strict=True)) / len(self.lengths)))

    def as_json(self) -> dict[str, Any]:
        prompts = [len(prompt.ids) for prompt in self.distinct]
        return {
            "requests": len(self.lengths),
            "samples": self.samples,
            "prompt_tokens": self.read,
            "reply_tokens": self.written,
            "prompt_lengths": [min(prompts), max(prompts)],
            "reply_lengths": [min(self.lengths), max(self.lengths)],
        }


def replies_to(backbone: Backbone, requests: int, samples: int, prompt_tokens: int, reply_tokens: int, seed: int) -> Replies:
    """Draw prompts and the lengths of their replies.

    Raises:
        ConfigError: a number is too small, or the longest prompt and reply exceed the model's context.
    """
    for option, value in (
        ("--requests", requests),
        ("--samples", samples),
        ("--prompt-tokens", prompt_tokens),
        ("--reply-tokens", reply_tokens),
    ):
        check_count(option, value)
    check_multiple(requests, samples)
    rng = random.Random(f"{seed}/prompts")
    distinct = [Prompt(random_ids(backbone, n, rng)) for n in spread_lengths(prompt_tokens, requests // samples, seed)]
    lengths = spread_lengths(reply_tokens, requests, seed + 1)
    context, longest = backbone.loaded.context_length, max(len(prompt.ids) for prompt in distinct) + max(lengths)
    if context is not None and longest > context:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} and --reply-tokens {reply_tokens} are means: the longest prompt and reply have "
            f"{longest} tokens, more than this model's context of {context}; pass smaller ones"
        )
    return Replies(tuple(prompt for prompt in distinct for _ in range(samples)), tuple(lengths), samples)


def add_random_role(backbone: Backbone, role: str, *, head: bool = False, seed: int = 0) -> None:
    """Add a role that differs from the base: with a zero matrix B, passes could skip its adapter."""
    backbone.roles.add(role, head=head, trainable=False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in backbone.roles.parameters(role).items():
        if ".lora_B." in name or name == "head.weight":
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
