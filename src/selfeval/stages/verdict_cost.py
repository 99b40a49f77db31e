"""The cost of a verdict, by the evaluator and by the judge that it learned from, on the same test pairs in the same process.

A verdict of the judge is one comparison in both orders, as the stage verdicts asks for it. A verdict of the evaluator is the
scores of both replies by all its members. Where the grade template shows the model's own working, a new question needs that
first: `evaluator` counts it, and `scoring` does not, as for all further replies to a question (best of n, policy training).
Loading the model is part of none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.judging.judge import Comparison, compare
from selfeval.quality.statistics import ratio_of_means
from selfeval.records import Question, Reply
from selfeval.rollout.engine import Request, count_tokens, generate
from selfeval.stages.context import Context

__all__ = ["Asked", "VerdictCost", "measure_cost"]

_BATCHES, _PAIRS = 4, 128
"""Pairs are timed in batches that alternate between evaluator and judge: what slows the machine down meets both."""


@dataclass(frozen=True)
class Asked:
    """A question and the two replies to judge."""

    question: Question
    replies: tuple[Reply, Reply]


@dataclass(frozen=True)
class _Spent:
    """What one batch took."""

    seconds: float
    read: int
    written: int

    def __add__(self, other: _Spent) -> _Spent:
        return _Spent(self.seconds + other.seconds, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class VerdictCost:
    """Costs per verdict, as report.json has them; each figure is a mean over pairs with its interval over batches.

    Attributes:
        tokens: {"pairs", "evaluator": {"tokens_read", "tokens_written"}, "scoring", "judge": the same}. The same in every run.
        seconds: {"pairs", "evaluator", "scoring", "judge", "judge_over_evaluator", "judge_over_scoring"}: wall time, of this
            machine.
    """

    tokens: dict[str, Any]
    seconds: dict[str, Any]


def measure_cost(context: Context, asked: Sequence[Asked]) -> VerdictCost | None:
    """Measure both on up to 128 random pairs; None where there is no pair."""
    picked = context.random("verdict cost").sample(list(asked), min(_PAIRS, len(asked)))
    size = max(1, len(picked) // _BATCHES)
    batches = [picked[i : i + size] for i in range(0, len(picked), size)]
    if not batches:
        return None
    spent: Mapping[str, list[_Spent]] = {"evaluator": [], "scoring": [], "judge": []}
    for batch in batches:
        workings, writing = _workings(context, batch)
        scoring = _by_evaluator(context, batch, workings)
        spent["evaluator"].append(writing + scoring)
        spent["scoring"].append(scoring)
        spent["judge"].append(_by_judge(context, batch))
    sizes = [len(batch) for batch in batches]
    return VerdictCost(
        {"pairs": len(picked), **{who: _tokens(rows, sizes) for who, rows in spent.items()}},
        {"pairs": len(picked), **_seconds(spent, sizes)},
    )


def _tokens(rows: Sequence[_Spent], sizes: Sequence[int]) -> dict[str, Any]:
    return {
        "tokens_read": ratio_of_means([row.read for row in rows], sizes).as_json(),
        "tokens_written": ratio_of_means([row.written for row in rows], sizes).as_json(),
    }


def _seconds(spent: Mapping[str, Sequence[_Spent]], sizes: Sequence[int]) -> dict[str, Any]:
    seconds = {who: [row.seconds for row in rows] for who, rows in spent.items()}
    return {
        **{who: ratio_of_means(times, sizes).as_json() for who, times in seconds.items()},
        "judge_over_evaluator": ratio_of_means(seconds["judge"], seconds["evaluator"]).as_json(),
        "judge_over_scoring": ratio_of_means(seconds["judge"], seconds["scoring"]).as_json(),
    }


def _by_judge(context: Context, batch: Sequence[Asked]) -> _Spent:
    config = context.config
    comparisons = [Comparison(a.question.text, a.replies[0].text, a.replies[1].text) for a in batch]
    start = perf_counter()
    with count_tokens() as tally, context.backbone.acting_as(BASE):
        compare(context.backbone, context.templates, "judge", comparisons, config.verdicts, rows=config.rollout_rows)
    return _Spent(perf_counter() - start, tally.read, tally.written)


def _by_evaluator(context: Context, batch: Sequence[Asked], workings: Sequence[str]) -> _Spent:
    scorer, start = context.scorer(), perf_counter()
    prompts = [
        context.templates.prompt("grade", question=a.question.text, working=working)
        for a, working in zip(batch, workings, strict=True)
    ]
    replies = [a.replies[0].ids for a in batch] + [a.replies[1].ids for a in batch]
    scorer.of(prompts * 2, replies).whole_B.tolist()  # read back, so that a GPU has finished
    scored = 2 * sum(map(len, prompts)) + sum(map(len, replies))
    return _Spent(perf_counter() - start, scored * len(scorer.members), 0)


def _workings(context: Context, batch: Sequence[Asked]) -> tuple[list[str], _Spent]:
    """The base's own greedy reply to each question, as the stage replies writes it; nothing where the template shows none."""
    config, templates = context.config, context.templates
    if not templates.grades_with_working:
        return [""] * len(batch), _Spent(0.0, 0, 0)
    start = perf_counter()
    requests = [Request(templates.prompt("reply", question=a.question.text), temperature=0.0) for a in batch]
    with count_tokens() as tally, context.backbone.acting_as(BASE):
        rollouts = generate(
            context.backbone, requests, max_new_tokens=config.replies.max_new_tokens, seed=0, rows=config.rollout_rows
        )
    texts = [templates.text(rollout.ids) for rollout in rollouts]
    return texts, _Spent(perf_counter() - start, tally.read, tally.written)
