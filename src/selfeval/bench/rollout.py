"""Sampling of replies: this package's engine, `generate` of transformers, and the limit.

Every reply has its own forced length, so all sides write the same number of tokens, and the lengths are spread as those of
replies that end by themselves. Both sides sample at temperature 1 under the same adapter. Ours also records the log-prob of
every token, which Hugging Face's side is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from selfeval.backbone.roles import Backbone
from selfeval.bench.hugging_face import bare_copy, load_causal, sample_replies, with_adapter
from selfeval.bench.limit import PlainPasses, limit_sides
from selfeval.bench.timing import Comparison, Side, take_turns, timed
from selfeval.bench.workloads import (
    BenchOptions,
    BenchResult,
    Replies,
    add_random_role,
    bench_config,
    check_count,
    load_backbone,
    measure_on,
    own_threads,
    replies_to,
)
from selfeval.rollout.engine import generate
from selfeval.rollout.requests import Request
from selfeval.training.context import POLICY

__all__ = ["BATCH_SIZES", "bench_rollout"]

BATCH_SIZES = (32, 64, 128, 256)
"""Batch sizes of Hugging Face; the fastest counts."""
_CHECKED = 32
"""Replies that both sides write greedily, to compare their tokens."""


def bench_rollout(
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
    """Measure sampling.

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
    add_random_role(backbone, POLICY)
    backbone.loaded.eos_ids = ()  # replies end at their lengths
    plain = load_causal(config, backbone, trust_remote_code=trusted)
    bare = bare_copy(plain)
    peer, device = with_adapter(plain, backbone, POLICY), backbone.loaded.device
    rows = config.backbone.rollout_batch_size
    written: dict[str, int] = {}

    def ours() -> None:
        written["ours"] = sum(map(len, sample_ours(backbone, replies, rows)))

    def theirs(size: int) -> None:
        written["hugging_face"] = sum(map(len, sample_replies(peer, backbone, replies, size)))

    passes = PlainPasses(bare, replies.read + replies.written, replies.width, replies.written)
    sides = [
        Side("ours", f"batch {min(rows, requests)}", partial(timed, ours, device)),
        *(
            Side("hugging_face", f"batch {size}", partial(timed, partial(theirs, size), device))
            for size in _row_counts(replies, batch_sizes)
        ),
        *limit_sides(passes),
    ]
    with own_threads(options):
        report_progress("comparing greedy replies")
        checks = _greedy_check(backbone, peer, replies, rows)
        times = take_turns(sides, options.rounds, report_progress)
        table = Comparison("sampling replies", "reply tokens", replies.written, measure_on(device), times)
        checks |= {"reply_tokens": {"wanted": replies.written, **written}}
        return BenchResult.of("rollout", backbone, replies.as_json() | {"seed": seed}, [table], checks)


def sample_ours(backbone: Backbone, replies: Replies, rows: int, *, temperature: float = 1.0) -> list[tuple[int, ...]]:
    """Sample the replies with this package's engine."""
    requests = [Request(p, temperature, limit=n) for p, n in zip(replies.prompts, replies.lengths, strict=True)]
    with backbone.acting_as(POLICY):
        found = generate(backbone, requests, max_new_tokens=max(replies.lengths), seed=0, batch_size=rows)
    return [rollout.ids for rollout in found]


def _row_counts(replies: Replies, wanted: Sequence[int]) -> list[int]:
    """Return the batch sizes that can be formed of whole prompts, without those that make no difference."""
    prompts = len(replies.distinct)
    return sorted({min(prompts, max(1, size // replies.samples)) * replies.samples for size in wanted})


def _greedy_check(backbone: Backbone, peer: object, replies: Replies, rows: int) -> dict[str, object]:
    """Return how many of the first replies have equal tokens on both sides if both take the likeliest ones."""
    few = max(1, _CHECKED // replies.samples) * replies.samples
    part = Replies(replies.prompts[:few], replies.lengths[:few], replies.samples)
    ours = sample_ours(backbone, part, rows, temperature=0.0)
    theirs = sample_replies(peer, backbone, part, len(part.lengths), greedy=True)
    equal = sum(list(a) == b for a, b in zip(ours, theirs, strict=True))
    return {"greedy_replies": {"compared": len(ours), "equal": equal}}
