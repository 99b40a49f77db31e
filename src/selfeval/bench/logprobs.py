"""Log-probs of given replies under a role: this package, all logits of transformers and PEFT, and the limit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from selfeval.backbone.sequences import reply_logprobs
from selfeval.bench.hugging_face import bare_copy, load_causal, with_adapter
from selfeval.bench.hugging_face import reply_logprobs as their_logprobs
from selfeval.bench.limit import PlainPasses, limit_sides
from selfeval.bench.timing import Comparison, Side, take_turns, timed
from selfeval.bench.workloads import (
    BenchOptions,
    BenchResult,
    add_random_role,
    bench_config,
    check_count,
    load_backbone,
    measure_on,
    own_threads,
    random_ids,
    replies_to,
)
from selfeval.training.context import POLICY

__all__ = ["BATCH_SIZES", "bench_logprobs"]

BATCH_SIZES = (32, 64)
"""Batch sizes of Hugging Face; the fastest counts."""


def bench_logprobs(
    options: BenchOptions,
    *,
    requests: int = 256,
    samples: int | None = None,
    prompt_tokens: int = 64,
    reply_tokens: int = 64,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    report_progress: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure the log-probs of the tokens of given replies.

    Args:
        options: model, device, precision, threads and rounds.
        requests: number of replies.
        samples: Optional. Replies per prompt. Default: 8, or all if there are fewer requests.
        prompt_tokens, reply_tokens: mean lengths.
        batch_sizes: batch sizes of Hugging Face.
        seed: seed of the texts.
        report_progress: called with the current step. Default: does nothing.

    Raises:
        ConfigError: a size is too small, or the texts exceed the model's context.
    """
    check_count("--rounds", options.rounds)
    for size in batch_sizes:
        check_count("--batch-size", size)
    config, trusted = bench_config(options), options.trust_remote_code
    report_progress(f"loading {config.model}")
    backbone = load_backbone(config, trust_remote_code=trusted)
    replies = replies_to(
        backbone, requests, min(8, requests) if samples is None else samples, prompt_tokens, reply_tokens, seed
    )
    rng = random.Random(f"{seed}/replies")
    ids = [random_ids(backbone, length, rng) for length in replies.lengths]
    add_random_role(backbone, POLICY)
    plain = load_causal(config, backbone, trust_remote_code=trusted)
    bare = bare_copy(plain)
    peer, device = with_adapter(plain, backbone, POLICY), backbone.loaded.device
    prompts, batch_tokens = [prompt.ids for prompt in replies.prompts], config.backbone.batch_tokens
    found: dict[str, Sequence[Sequence[float]]] = {}

    def ours() -> None:
        with backbone.acting_as(POLICY):
            found["ours"] = reply_logprobs(backbone, replies.prompts, ids, batch_tokens=batch_tokens)

    def theirs(size: int) -> None:
        found["hugging_face"] = their_logprobs(peer, backbone, prompts, ids, size)

    passes = PlainPasses(bare, replies.read + replies.written, replies.width, replies.written)
    sides = [
        Side("ours", f"{backbone.budget.scored_at_once(batch_tokens):,} tokens", partial(timed, ours, device)),
        *(
            Side("hugging_face", f"batch {size}", partial(timed, partial(theirs, size), device))
            for size in sorted({min(size, requests) for size in batch_sizes})
        ),
        *limit_sides(passes),
    ]
    with own_threads(options):
        times = take_turns(sides, options.rounds, report_progress)
        table = Comparison("log-probs of replies", "reply tokens", replies.written, measure_on(device), times)
        pairs = [
            (a, b)
            for mine, yours in zip(found["ours"], found["hugging_face"], strict=True)
            for a, b in zip(mine, yours, strict=True)
        ]
        checks = {"logprobs": {"tokens": len(pairs), "largest_difference": max(abs(a - b) for a, b in pairs)}}
        return BenchResult.of("logprobs", backbone, replies.as_json() | {"seed": seed}, [table], checks)
