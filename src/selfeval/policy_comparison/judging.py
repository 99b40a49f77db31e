"""Judge the replies of each pair of policies, by judges that are models or by gold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from selfeval.evaluation.policy import Outcome, outcome
from selfeval.judge_benchmark.judging import judge_comparisons
from selfeval.judge_benchmark.subject import Subject
from selfeval.judging.protocol import Comparison, Judgement
from selfeval.stages.gold import Gold, ask_ahead
from selfeval.stages.shards import Batch, InProcess, ModelHandle, ShardOutput, StageShards, map_shards
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, fingerprint

__all__ = ["SHARD", "GoldJudge", "JudgeReplies", "ModelJudge", "PairJudge"]

SHARD = 32
"""Comparisons per shard: the work that a kill can lose."""


class PairJudge(Protocol):
    """Decides comparisons of two policies."""

    @property
    def name(self) -> str:
        """Name of the judge in the figures."""
        ...

    def outcomes(self, comparisons: Sequence[Comparison], title: str) -> list[Outcome]:
        """Return the outcome of each comparison for its first reply.

        Args:
            comparisons: questions with the replies of two policies.
            title: names of the policies, for the progress bar.
        """
        ...


@dataclass(frozen=True)
class JudgeReplies:
    """Work: judge the comparisons of a shard."""

    subject: Subject

    def __call__(self, model: ModelHandle, batch: Batch[Comparison]) -> ShardOutput:
        """Return a `Judgement` for each comparison."""
        return ShardOutput(judge_comparisons(self.subject, model, batch.records))


@dataclass(frozen=True)
class ModelJudge:
    """The referee, the judge or the evaluator of a run. Equal replies are a tie, without asking it.

    Attributes:
        name: name of its role.
        subject: the judge.
        store: folder of the results, in which judgements are kept under a fingerprint of judge and comparisons.
        terminal: shows progress.
        model: returns the model; called only if something is left to judge.
    """

    name: str
    subject: Subject
    store: RunStore
    terminal: Terminal
    model: Callable[[], ModelHandle]

    def outcomes(self, comparisons: Sequence[Comparison], title: str) -> list[Outcome]:
        """Return the outcome of each comparison for its first reply."""
        different = [one for one in comparisons if one.first != one.second]
        judged = iter(self._judgements(different, title))
        tie = self.subject.config.judging(self.subject.judge_role).tie
        return [outcome(next(judged), tie) if one.first != one.second else "tie" for one in comparisons]

    def _judgements(self, comparisons: Sequence[Comparison], title: str) -> list[Judgement]:
        texts = [(c.question, c.first, c.second, c.first_cut, c.second_cut) for c in comparisons]
        stage = f"judgements-{fingerprint([self.subject.key, texts])}"
        shards = StageShards(self.store, self.terminal, stage, title=f"{self.name}: {title}")
        map_shards(shards, comparisons, SHARD, JudgeReplies(self.subject), InProcess(self.model))
        return self.store.read(stage, Judgement)


@dataclass(frozen=True)
class GoldJudge:
    """Gold as a judge: the right reply wins over a wrong one, two equally right ones are a tie.

    Attributes:
        gold: the oracle.
        name: `gold`.
    """

    gold: Gold
    name: str = "gold"

    def outcomes(self, comparisons: Sequence[Comparison], title: str) -> list[Outcome]:
        """Return the outcome of each comparison for its first reply; `unparsable` if gold does not know the question."""
        ask_ahead(self.gold, [(c.question, reply) for c in comparisons for reply in (c.first, c.second)])
        return [self._outcome(one) for one in comparisons]

    def _outcome(self, comparison: Comparison) -> Outcome:
        first, second = (self.gold.is_right(comparison.question, text) for text in (comparison.first, comparison.second))
        if first is None or second is None:
            return "unparsable"
        return "tie" if first == second else "win" if first else "loss"
