"""Judging pairs of replies in both orders, and scoring them with an evaluator: this package, Hugging Face, and the limit.

The judge writes no chain of thought: the probabilities of its labels are read right after the prompt. Hugging Face's side does
the same for the same prompts, by a forward pass or by generating one token. Rendering and tokenizing the prompts is part of
the work of both. The evaluator is an adapter with a head; on Hugging Face's side it is a sequence classifier.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfeval.backbone.adapters import BASE
from selfeval.backbone.merging import classifier_class
from selfeval.backbone.roles import Backbone
from selfeval.bench.hugging_face import (
    bare_copy,
    last_logits,
    last_logits_by_generate,
    load_causal,
    load_classifier,
    reply_scores,
    with_adapter,
)
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
    spread_lengths,
)
from selfeval.config import RunConfig
from selfeval.errors import ConfigError
from selfeval.judging.judges import make_judge
from selfeval.judging.labels import VerdictTokens, verdict_tokens
from selfeval.judging.orders import combine
from selfeval.judging.pooling import Reading
from selfeval.judging.protocol import Comparison as Pair
from selfeval.judging.templates import Templates, templates_folder
from selfeval.prompt import Prompt
from selfeval.training.evaluator import EVALUATOR
from selfeval.training.scoring import EvaluatorScorer

__all__ = ["BATCH_SIZES", "bench_judge"]

BATCH_SIZES = (32, 64)
"""Batch sizes of Hugging Face; the fastest counts."""
_WORDS = ("the", "a", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "from", "one")
_SETTINGS = (
    "verdicts.judge=pairwise",
    "verdicts.reasoning=false",
    "verdicts.votes=1",
    "verdicts.label_mass=0",
    "verdicts.calibration.method=off",
)
"""The judge that is measured. A model that is unlikely to write a label gets verdicts as well, because its time is the same."""
LastLogits = Callable[[Any, Backbone, Sequence[Sequence[int]], int], Tensor]


def bench_judge(
    options: BenchOptions,
    *,
    requests: int = 256,
    prompt_tokens: int = 32,
    reply_tokens: int = 64,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seed: int = 0,
    report_progress: Callable[[str], None] = lambda text: None,
) -> BenchResult:
    """Measure verdicts and scores.

    Args:
        options: model, device, precision, threads and rounds.
        requests: number of pairs.
        prompt_tokens, reply_tokens: mean lengths of a question and of a reply.
        batch_sizes: batch sizes of Hugging Face.
        seed: seed of the texts.
        report_progress: called with the current step. Default: does nothing.

    Raises:
        ConfigError: a size is too small, or the texts exceed the model's context.
    """
    counts = [("--rounds", options.rounds), ("--requests", requests), ("--prompt-tokens", prompt_tokens)]
    for option, value in (*counts, ("--reply-tokens", reply_tokens), *(("--batch-size", size) for size in batch_sizes)):
        check_count(option, value)
    config, trusted = bench_config(options, *_SETTINGS), options.trust_remote_code
    report_progress(f"loading {config.model}")
    backbone = load_backbone(config, trust_remote_code=trusted)
    with own_threads(options):
        plain = load_causal(config, backbone, trust_remote_code=trusted)
        pairs = _pairs(backbone.loaded.tokenizer, requests, prompt_tokens, reply_tokens, seed)
        bench = _Verdicts(config, backbone, pairs)
        verdicts, checks = bench.run(plain, batch_sizes, options.rounds, report_progress)
        scoring = _Scores(config, backbone, requests, prompt_tokens, reply_tokens, seed)
        scores, more = scoring.run(bare_copy(plain), batch_sizes, options, report_progress)
        sizes = {"pairs": requests, "seed": seed, "judge_prompt_tokens": bench.tokens, **scoring.sizes}
        return BenchResult.of("judge", backbone, sizes, [verdicts, scores], checks | more)


# -- verdicts -----------------------------------------------------------------------------------------------------------


def _pairs(tokenizer: PreTrainedTokenizerBase, count: int, question: int, reply: int, seed: int) -> list[Pair]:
    """Return questions with two replies each, of common words."""
    rng = random.Random(f"{seed}/texts")
    sizes = {word: len(tokenizer.encode(f" {word}", add_special_tokens=False)) for word in _WORDS}

    def text(tokens: int) -> str:
        words: list[str] = []
        while tokens > 0:
            words.append(rng.choice(_WORDS))
            tokens -= max(1, sizes[words[-1]])
        return " ".join(words)

    questions = spread_lengths(question, count, seed)
    firsts, seconds = (spread_lengths(reply, count, seed + k) for k in (1, 2))
    return [Pair(text(a), text(b), text(c)) for a, b, c in zip(questions, firsts, seconds, strict=True)]


class _Verdicts:
    """The comparison of judges on the same pairs."""

    def __init__(self, config: RunConfig, backbone: Backbone, pairs: Sequence[Pair]) -> None:
        self.config, self.backbone, self.pairs = config, backbone, pairs
        (self.kind,) = config.verdicts.kinds("judge")
        folder = templates_folder(config.model, config.templates)
        self.templates = Templates.load(
            folder, backbone.loaded.tokenizer, kinds=(self.kind,), arguments=config.chat.arguments, system=""
        )
        self.labels: VerdictTokens = verdict_tokens(self.templates, self.templates.labels(self.kind))
        self.size = config.backbone.rollout_batch_size
        self.judge = make_judge(backbone, self.templates, config.verdicts, batch_size=self.size)
        lengths = [len(row) for row in self._rows(())]
        self.tokens, self.width = sum(lengths), max(2, round(sum(lengths) / len(lengths)))
        context, longest = backbone.loaded.context_length, max(lengths) + self.labels.longest
        if context is not None and longest > context:
            raise ConfigError(
                f"the longest prompt of the judge has {longest} tokens, more than this model's context of {context}; pass a "
                "smaller --prompt-tokens or --reply-tokens"
            )

    def run(
        self, plain: Any, batch_sizes: Sequence[int], rounds: int, report_progress: Callable[[str], None]
    ) -> tuple[Comparison, dict[str, Any]]:
        """Return the times of all sides, and the largest difference of their probabilities."""
        device = self.backbone.loaded.device
        found: dict[str, list[float]] = {}

        def ours() -> None:
            found["ours"] = self._ours()

        def theirs(name: str, read: LastLogits, size: int) -> None:
            found[name] = self._theirs(plain, read, size)

        ways: dict[str, LastLogits] = {"forward": last_logits, "generate": last_logits_by_generate}
        sides = [
            Side("ours", f"batch {min(self.size, 2 * len(self.pairs))}", partial(timed, ours, device)),
            *(
                Side(
                    "hugging_face",
                    f"{name}, batch {size}",
                    partial(timed, partial(theirs, name, read, size), device),
                )
                for name, read in ways.items()
                for size in _sizes(batch_sizes, 2 * len(self.pairs))
            ),
            *limit_sides(PlainPasses(plain, self.tokens, self.width, 2 * len(self.pairs))),
        ]
        times = take_turns(sides, rounds, lambda text: report_progress(f"verdicts, {text}"))
        table = Comparison("verdicts in both orders", "pairs", len(self.pairs), measure_on(device), times)
        differences = {f"with_{name}": _difference(found["ours"], found[name]) for name in ways}
        return table, {"verdicts": {"pairs": len(found["ours"]), "largest_difference": differences}}

    def _ours(self) -> list[float]:
        """Return the probability of each pair's first reply by this package's judge; NaN without a verdict."""
        with self.backbone.acting_as(BASE):
            found = self.judge.judge(self.pairs)
        return [math.nan if one.probability is None else one.probability for one in found]

    def _rows(self, fork: Sequence[int]) -> list[list[int]]:
        """Return the tokens before a label: all pairs in order, then swapped."""
        return [[*self._prompt(pair).ids, *self.labels.lead, *fork] for pair in (*self.pairs, *(p.swapped for p in self.pairs))]

    def _prompt(self, pair: Pair) -> Prompt:
        shown = {name: getattr(pair, name) for name in ("question", "first", "second", "first_cut", "second_cut")}
        return self.templates.prompt(self.kind, **shown)

    def _theirs(self, plain: Any, read: LastLogits, size: int) -> list[float]:
        """Return the same probabilities from the logits of Hugging Face's model."""
        logprobs = {
            fork: torch.log_softmax(read(plain, self.backbone, self._rows(fork), size), -1) for fork in self.labels.forks
        }
        paths = [
            torch.stack([logprobs[path[:k]][:, token] for k, token in enumerate(path)]).sum(0) for path in self.labels.paths
        ]
        probabilities = torch.stack(paths, dim=1).exp().tolist()
        readings = [Reading(tuple(row), "", label_mass=sum(row)) for row in probabilities]
        half = len(self.pairs)
        judged = [combine(a, b).probability for a, b in zip(readings[:half], readings[half:], strict=True)]
        return [math.nan if one is None else one for one in judged]


def _sizes(wanted: Sequence[int], rows: int) -> list[int]:
    """Return the batch sizes without those that make no difference."""
    return sorted({min(size, rows) for size in wanted})


def _difference(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the largest difference; None if a value is missing on one side only."""
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True) if not (math.isnan(a) and math.isnan(b))]
    return None if any(map(math.isnan, gaps)) else max(gaps, default=0.0)


# -- scores -------------------------------------------------------------------------------------------------------------


class _Scores:
    """The comparison of evaluators on pairs of replies that share their prompt."""

    def __init__(
        self, config: RunConfig, backbone: Backbone, count: int, prompt_tokens: int, reply_tokens: int, seed: int
    ) -> None:
        self.config, self.backbone, self.count = config, backbone, count
        self.replies = replies_to(backbone, 2 * count, 2, prompt_tokens, reply_tokens, seed)
        rng = random.Random(f"{seed}/replies")
        self.ids = [random_ids(backbone, length, rng) for length in self.replies.lengths]
        self.sizes = {"scored_prompt_tokens": self.replies.read, "scored_reply_tokens": self.replies.written}
        add_random_role(backbone, EVALUATOR, head=True)

    def run(
        self, bare: Any, batch_sizes: Sequence[int], options: BenchOptions, report_progress: Callable[[str], None]
    ) -> tuple[Comparison, dict[str, Any]]:
        """Return the times of all sides, and the largest difference of their scores."""
        device, found = self.backbone.loaded.device, dict[str, list[float]]()
        rows = [[*prompt.ids, *ids] for prompt, ids in zip(self.replies.prompts, self.ids, strict=True)]
        scorer = EvaluatorScorer(self.backbone, self.config.backbone.batch_tokens)
        has_peer = classifier_class(self.backbone.model.config) is not None
        peer = self._peer(options) if has_peer else None

        def ours() -> None:
            found["ours"] = scorer.of(self.replies.prompts, self.ids).whole_B.tolist()

        def theirs(size: int) -> None:
            found["hugging_face"] = reply_scores(peer, self.backbone, rows, size)

        passes = PlainPasses(bare, self.replies.read + self.replies.written, self.replies.width, 0)
        sides = [
            Side("ours", f"{self.backbone.budget.scored_at_once(scorer.batch_tokens):,} tokens", partial(timed, ours, device)),
            *(
                Side("hugging_face", f"batch {n}", partial(timed, partial(theirs, n), device))
                for n in (_sizes(batch_sizes, len(rows)) if has_peer else ())
            ),
            *limit_sides(passes),
        ]
        times = take_turns(sides, options.rounds, lambda text: report_progress(f"scores, {text}"))
        table = Comparison("evaluator scores", "pairs", self.count, measure_on(device), times)
        # A family without a class for sequence classification has no other side.
        difference = _difference(found["ours"], found["hugging_face"]) if has_peer else None
        return table, {"scores": {"replies": len(found["ours"]), "largest_difference": difference}}

    def _peer(self, options: BenchOptions) -> Any:
        model = load_classifier(self.config, self.backbone, trust_remote_code=options.trust_remote_code)
        return with_adapter(model, self.backbone, EVALUATOR)
