"""pairs: convert kept verdicts to preference pairs, with the judge's confidence as the label.

Pairs of training questions that people labelled with `selfeval label --use-for-training` have their preference instead,
whatever the verdict; a pair that they call a tie is left out. No other label is read.

Training and held-out pairs are in separate folders, pairs/train and pairs/test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from selfeval.config import RunConfig
from selfeval.errors import LoopError
from selfeval.evaluation.judge_probe import diagnose, probe_sentences
from selfeval.labelling.pairs import PairKey, key_of, of_verdicts
from selfeval.labelling.training import CONFIDENCE, preferences, training_labels
from selfeval.records import LabelChoice, Pair, Question, Reply, Split, Verdict, VerdictState
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
    people = _preferences(context)
    pairs = _kept(context, people)
    train = len(pairs[Split.TRAIN])
    if train < FEWEST and not context.earlier:  # a better policy yields fewer; earlier rounds have some
        raise LoopError(_too_few(train, context.store.read("verdicts", Verdict), context.config))
    for split, found in pairs.items():
        context.store.write_shard(pairs_of(split), 0, found)
    labelled = {"labelled": len(people)} if people else {}
    return {"train": train, "held_out": len(pairs[Split.TEST]), **labelled}


def _preferences(context: Context) -> Mapping[PairKey, LabelChoice]:
    """Return the preferences of people on pairs of training questions."""
    labels = training_labels(context.labels)
    if not labels:
        return {}
    verdicts = [verdict for verdict in context.store.read("verdicts", Verdict) if verdict.split == Split.TRAIN]
    questions = {question.id: question.text for question in context.store.read("questions", Question)}
    replies = {id: reply.text for id, reply in context.replies().items()}
    return preferences(of_verdicts(verdicts, questions, replies), labels)


def _kept(context: Context, people: Mapping[PairKey, LabelChoice]) -> dict[Split, list[Pair]]:
    """Return the pairs of the verdicts by split: those kept, with the preferences of people in place of the judge's."""
    questions = {q.id: q.text for q in context.store.read("questions", Question)}
    replies = context.replies()
    pairs: dict[Split, list[Pair]] = {split: [] for split in Split}
    for verdict in context.store.read("verdicts", Verdict):
        probability = _label_of(verdict, people.get(key_of(verdict.question_id, verdict.first, verdict.second)))
        if probability is not None:
            pairs[verdict.split].append(_pair(verdict, questions[verdict.question_id], replies, probability))
    return pairs


def _label_of(verdict: Verdict, choice: LabelChoice | None) -> float | None:
    """Return the probability that the first reply is better, as the label of a pair; None if the pair is left out."""
    if choice is None:
        return verdict.probability if verdict.state == VerdictState.KEPT else None
    return {LabelChoice.FIRST: CONFIDENCE, LabelChoice.SECOND: 1 - CONFIDENCE}.get(choice)


def _pair(verdict: Verdict, question: str, replies: Mapping[str, Reply], probability: float) -> Pair:
    first, second = replies[verdict.first], replies[verdict.second]
    # Exactly 0.5 comes only from a file of pairs; either order would do, because the label says that neither is better.
    chosen, rejected = (first, second) if probability >= 0.5 else (second, first)
    return Pair(
        verdict.question_id,
        question,
        chosen.text,
        rejected.text,
        max(probability, 1.0 - probability),
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
