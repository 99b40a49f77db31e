"""The cost of a verdict by the evaluator and by the judge that it learned from, on the same test pairs in the same process.

A verdict of the judge is one comparison, as in the verdicts stage. A verdict of the evaluator is the scores of
both replies by all its members. If the grade template shows the model's reference answer, a new question needs that first:
`evaluator` includes it; `scoring` does not, as for all further replies to a question (best of n, policy training). Loading
the model is never included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from selfeval.backbone.adapters import BASE
from selfeval.config import judge_spec
from selfeval.quality.statistics import ratio_of_means
from selfeval.records import Question, Reply
from selfeval.report.schema import SecondsPerVerdict, TokensOf, TokensPerVerdict
from selfeval.rollout.engine import count_tokens, generate
from selfeval.rollout.requests import Request
from selfeval.stages.context import Context
from selfeval.stages.verdicts import compared

__all__ = [
    "BATCHES",
    "PAIRS",
    "SMALLEST",
    "Asked",
    "VerdictCost",
    "measure_cost",
]

BATCHES = 4
"""Number of batches. They alternate between evaluator and judge, so a temporary slowdown affects both."""
SMALLEST = 8
"""Minimum number of pairs in a batch, but there are at least two batches: a run judges many pairs at once."""
PAIRS = 128
"""Maximum number of test pairs that are timed."""


@dataclass(frozen=True)
class Asked:
    """A question and the two replies to judge."""

    question: Question
    replies: tuple[Reply, Reply]


@dataclass(frozen=True)
class _Spent:
    """Time and tokens of one batch."""

    seconds: float
    read: int
    written: int

    def __add__(self, other: _Spent) -> _Spent:
        return _Spent(self.seconds + other.seconds, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class VerdictCost:
    """Costs per verdict, as in report.json; each figure is a mean over pairs with its interval over batches.

    Attributes:
        tokens: tokens read and written; the same in every run.
        seconds: wall time on this machine.
    """

    tokens: TokensPerVerdict
    seconds: SecondsPerVerdict


def measure_cost(context: Context, asked: Sequence[Asked]) -> VerdictCost | None:
    """Measure both on up to 128 random pairs; None if there are no pairs, or if the judge is a server.

    The answers of a server come from the cache by now, and its time is that of another machine and of the network.
    """
    if judge_spec("judge", context.config.verdicts.judge).is_remote:
        return None
    picked = context.random("verdict cost").sample(list(asked), min(PAIRS, len(asked)))
    # Left-over pairs form further batches; the means are weighted by size.
    size = max(1, len(picked) // BATCHES, min(SMALLEST, len(picked) // 2))
    batches = [picked[i : i + size] for i in range(0, len(picked), size)]
    if not batches:
        return None
    spent: Mapping[str, list[_Spent]] = {"evaluator": [], "scoring": [], "judge": []}
    for batch in batches:
        reference_answers, writing = _reference_answers(context, batch)
        scoring = _by_evaluator(context, batch, reference_answers)
        spent["evaluator"].append(writing + scoring)
        spent["scoring"].append(scoring)
        spent["judge"].append(_by_judge(context, batch))
    sizes = [len(batch) for batch in batches]
    return VerdictCost(
        TokensPerVerdict(
            pairs=len(picked),
            evaluator=_tokens(spent["evaluator"], sizes),
            scoring=_tokens(spent["scoring"], sizes),
            judge=_tokens(spent["judge"], sizes),
        ),
        _seconds(len(picked), spent, sizes),
    )


def _tokens(rows: Sequence[_Spent], sizes: Sequence[int]) -> TokensOf:
    return TokensOf(
        tokens_read=ratio_of_means([row.read for row in rows], sizes),
        tokens_written=ratio_of_means([row.written for row in rows], sizes),
    )


def _seconds(pairs: int, spent: Mapping[str, Sequence[_Spent]], sizes: Sequence[int]) -> SecondsPerVerdict:
    evaluator, scoring, judge = ([row.seconds for row in spent[who]] for who in ("evaluator", "scoring", "judge"))
    return SecondsPerVerdict(
        pairs=pairs,
        evaluator=ratio_of_means(evaluator, sizes),
        scoring=ratio_of_means(scoring, sizes),
        judge=ratio_of_means(judge, sizes),
        judge_over_evaluator=ratio_of_means(judge, evaluator),
        judge_over_scoring=ratio_of_means(judge, scoring),
    )


def _by_judge(context: Context, batch: Sequence[Asked]) -> _Spent:
    # Built before the clock starts.
    judge = context.judge()
    comparisons = [compared(a.question, *a.replies) for a in batch]
    start = perf_counter()
    with count_tokens() as tally, context.backbone.acting_as(BASE):
        judge.judge(comparisons)
    return _Spent(perf_counter() - start, tally.read, tally.written)


def _by_evaluator(context: Context, batch: Sequence[Asked], reference_answers: Sequence[str]) -> _Spent:
    scorer, start = context.scorer(), perf_counter()
    # Building the prompts is part of the cost, as it is for the judge.
    varies = context.config.evaluator.varies_reference
    prompts = [
        context.templates.grade_prompt(a.question.text, answer, alone=varies)
        for a, answer in zip(batch, reference_answers, strict=True)
    ]
    replies = [a.replies[0].ids for a in batch] + [a.replies[1].ids for a in batch]
    scorer.of(prompts * 2, replies).whole_B.tolist()  # reading back waits for the GPU
    # Both replies to a question are scored after the same prompt.
    read = 2 * sum(len(prompt.ids) for member in scorer.members for prompt in member.read(prompts))
    return _Spent(perf_counter() - start, read + sum(map(len, replies)) * len(scorer.members), 0)


def _reference_answers(context: Context, batch: Sequence[Asked]) -> tuple[list[str], _Spent]:
    """Generate the base's reference answer to each question, as in the replies stage; empty if the template shows none."""
    config, templates = context.config, context.templates
    if not templates.grades_with_reference_answer:
        return [""] * len(batch), _Spent(0.0, 0, 0)
    start = perf_counter()
    requests = [Request(templates.reply_prompt(a.question), temperature=0.0) for a in batch]
    with count_tokens() as tally, context.backbone.acting_as(BASE):
        rollouts = generate(
            context.backbone,
            requests,
            max_new_tokens=context.reply_limit,
            seed=0,
            batch_size=config.backbone.rollout_batch_size,
            thinking=context.thinking,
        )
    texts = [templates.text(rollout.reply_ids) for rollout in rollouts]
    return texts, _Spent(perf_counter() - start, tally.read, tally.written)
