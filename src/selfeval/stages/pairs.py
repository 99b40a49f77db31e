"""pairs: convert kept verdicts to preference pairs, with the judge's confidence as the label.

Training and held-out pairs are in separate folders, pairs/train and pairs/test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from selfeval.config import RunConfig
from selfeval.errors import LoopError
from selfeval.evaluation.judge_probe import diagnose, probe_sentences
from selfeval.records import Pair, Question, Reply, Split, Verdict, VerdictState
from selfeval.report.summary import OTHER_JUDGES
from selfeval.runs.reader import pairs_of
from selfeval.stages.context import Context

__all__ = ["FEWEST", "run"]

FEWEST = 4
"""Minimum number of training pairs for an evaluator."""


def run(context: Context) -> dict[str, int]:
    """Write the pairs and return counts.

    Raises:
        LoopError: too few verdicts were kept; the message counts the others by state.
    """
    pairs = _kept(context)
    train = len(pairs[Split.TRAIN])
    if train < FEWEST and not context.earlier:  # a better policy yields fewer; earlier rounds have some
        raise LoopError(_too_few(train, context.store.read("verdicts", Verdict), context.config))
    for split, found in pairs.items():
        context.store.write_shard(pairs_of(split), 0, found)
    return {"train": train, "held_out": len(pairs[Split.TEST])}


def _kept(context: Context) -> dict[Split, list[Pair]]:
    """Return the pairs of the kept verdicts by split."""
    questions = {q.id: q.text for q in context.store.read("questions", Question)}
    replies = context.replies()
    pairs: dict[Split, list[Pair]] = {split: [] for split in Split}
    for verdict in context.store.read("verdicts", Verdict):
        if verdict.state == VerdictState.KEPT and verdict.probability is not None:
            pairs[verdict.split].append(_pair(verdict, questions[verdict.question_id], replies, verdict.probability))
    return pairs


def _pair(verdict: Verdict, question: str, replies: Mapping[str, Reply], probability: float) -> Pair:
    first, second = replies[verdict.first], replies[verdict.second]
    # Exactly 0.5 comes only from a file of pairs; either order would do, because the label says that neither is better.
    chosen, rejected = (first, second) if probability >= 0.5 else (second, first)
    return Pair(
        verdict.question_id,
        question,
        chosen.text,
        rejected.text,
        verdict.confidence,
        chosen.ids,
        rejected.ids,
        verdict.split,
    )


def _too_few(train: int, verdicts: list[Verdict], config: RunConfig) -> str:
    states = Counter(v.state.value for v in verdicts)
    seen = ", ".join(f"{state.value} {states.get(state.value, 0)}" for state in VerdictState)
    findings = "; ".join(probe_sentences(diagnose(verdicts, config)))
    return (
        f"only {train} training pairs survived judging ({seen}); an evaluator needs at least {FEWEST}. "
        f"{findings or 'More questions (questions.train) give more pairs'}. {OTHER_JUDGES}. Inspect the judge's output with "
        "`selfeval show DIR dropped`"
    )
