"""Judge labelled pairs shard by shard, with the log-probs of both replies under the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from selfeval.backbone.adapters import BASE
from selfeval.backbone.sequences import reply_logprobs
from selfeval.config import VerdictsConfig
from selfeval.judge_benchmark.pairs import LabelledPair
from selfeval.judge_benchmark.subject import Subject
from selfeval.judging.calibrated import rounded_judgement
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import Comparison, Judgement, state_of
from selfeval.prompt import Prompt
from selfeval.quality.statistics import rounded
from selfeval.records import Split, Verdict
from selfeval.runs.evaluator import Evaluator
from selfeval.runs.model import RunModel
from selfeval.runs.reader import RunReader
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput

__all__ = ["SHARD", "JudgeLabelled", "Outcome", "judge_comparisons"]

SHARD = 32
"""Pairs per shard: the work that a kill can lose."""


@dataclass(frozen=True)
class Outcome:
    """The result on one pair.

    Attributes:
        judgement: the judgement; its `first` is that of the pair.
        logprobs: mean log-prob per token of each reply under the base, in nats; None if the reply does not fit the context.
    """

    judgement: Judgement
    logprobs: tuple[float | None, float | None] = (None, None)

    def verdict(self, config: VerdictsConfig) -> Verdict:
        """Return the judgement as a record of a run, with the state that the settings give it."""
        judgement = self.judgement
        return Verdict(
            *("", Split.TEST, "first", "second"),
            state=state_of(judgement, config),
            probability=judgement.probability,
            tie=judgement.tie,
            evidence=judgement.evidence,
        )


@dataclass(frozen=True)
class JudgeLabelled:
    """Work: judge the pairs of a shard.

    Attributes:
        subject: the judge under test.
        logprobs: compute the log-probs of the replies. Default: True.
    """

    subject: Subject
    logprobs: bool = True

    def __call__(self, model: ModelHandle, batch: Batch[LabelledPair]) -> ShardOutput:
        """Return an `Outcome` for each pair."""
        comparisons = [Comparison(pair.question, pair.first, pair.second) for pair in batch.records]
        judgements = judge_comparisons(self.subject, model, comparisons)
        logprobs = self._logprobs(model, batch.records) if self.logprobs else [(None, None)] * len(batch.records)
        return ShardOutput([Outcome(*one) for one in zip(judgements, logprobs, strict=True)])

    def _logprobs(self, model: ModelHandle, pairs: Sequence[LabelledPair]) -> list[tuple[float | None, float | None]]:
        end = model.backbone.loaded.eos_ids[:1]
        asked = [(pair.question, text) for pair in pairs for text in (pair.first, pair.second)]
        prompts = [model.templates.prompt("reply", question=question) for question, _ in asked]
        ids = [(*model.templates.reply_ids(text), *end) for _, text in asked]
        fitting = [n for n in range(len(asked)) if _fits(model, prompts[n], len(ids[n]))]
        with model.backbone.acting_as(BASE):
            found = reply_logprobs(
                model.backbone,
                [prompts[n] for n in fitting],
                [ids[n] for n in fitting],
                batch_tokens=self.subject.config.backbone.batch_tokens,
            )
        means = {n: rounded(fmean(values)) for n, values in zip(fitting, found, strict=True)}
        return [(means.get(2 * n), means.get(2 * n + 1)) for n in range(len(pairs))]


def judge_comparisons(subject: Subject, model: ModelHandle, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Return one judgement per comparison, with the precision of numbers in files. The thinking of replies is not shown.

    Args:
        subject: the judge.
        model: its model and prompts, as `Subject.load` returns them.
        comparisons: questions with two replies each.
    """
    without = model.templates.without_thinking
    shown = [replace(c, first=without(c.first), second=without(c.second)) for c in comparisons]
    if subject.role == "evaluator":
        return list(map(rounded_judgement, _by_evaluator(subject, model, shown)))
    judge = make_judge(
        *(model.backbone, model.templates, subject.config.judging(subject.judge_role)),
        batch_size=subject.config.backbone.rollout_batch_size,
        role=subject.judge_role,
        seed=subject.seed,
        answers=model.answers,
        fit=subject.fit,
    )
    with model.backbone.acting_as(BASE):
        return list(map(rounded_judgement, judge.judge(shown)))


def _by_evaluator(subject: Subject, model: ModelHandle, comparisons: Sequence[Comparison]) -> list[Judgement]:
    """Compare by the scores of the evaluator. Without a score for one of the replies there is no probability."""
    assert subject.run is not None
    run = RunModel(RunReader(subject.run), model.backbone, model.templates)
    # Some grade templates show a reference answer, which does not exist yet: its maximum length is assumed.
    room = run.reply_limit if model.templates.grades_with_reference_answer else 0
    evaluator = Evaluator(run)  # its roles are loaded by the first shard only
    fitting = [c for c in comparisons if _can_score(model, c, room)]
    # Confidence that the preferred reply is better.
    rankings = evaluator.rank([(c.question, (c.first, c.second)) for c in fitting])
    found: dict[int, Judgement] = {}
    for comparison, ranking in zip(fitting, rankings, strict=True):
        assert ranking.confidence is not None
        found[id(comparison)] = Judgement(ranking.confidence if ranking.preferred == 0 else 1.0 - ranking.confidence)
    return [found.get(id(c), Judgement(None)) for c in comparisons]


def _can_score(model: ModelHandle, comparison: Comparison, room: int) -> bool:
    """Return whether the evaluator can read both replies: none is empty, and they fit the context."""
    prompt = model.templates.prompt("grade", question=comparison.question, reference_answer="")
    replies = comparison.first, comparison.second
    # One more token: the score is read at the end token.
    sizes = [len(model.templates.reply_ids(text)) + 1 + room for text in replies]
    return all(text.strip() for text in replies) and all(_fits(model, prompt, size) for size in sizes)


def _fits(model: ModelHandle, prompt: Prompt, size: int) -> bool:
    length = model.backbone.loaded.context_length
    return length is None or len(prompt.ids) + size <= length
