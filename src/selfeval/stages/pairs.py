"""pairs: kept verdicts become preference pairs, with the judge's confidence as their label."""

from __future__ import annotations

from collections import Counter

from selfeval.errors import LoopError
from selfeval.records import Pair, Question, Split, Verdict, VerdictState
from selfeval.stages.context import Context

__all__ = ["FEWEST", "run"]

FEWEST = 4
"""Fewest training pairs that an evaluator can be trained on."""


def run(context: Context) -> dict[str, int]:
    """Writes the pairs; returns counts.

    Raises:
        LoopError: hardly any verdict was kept; the message says what the others were.
    """
    questions = {q.id: q for q in context.store.read("questions", Question)}
    replies, verdicts = context.replies(), context.store.read("verdicts", Verdict)
    pairs = []
    for verdict in verdicts:
        if verdict.state != VerdictState.KEPT or verdict.probability is None:
            continue
        first, second = replies[verdict.first], replies[verdict.second]
        chosen, rejected = (first, second) if verdict.probability >= 0.5 else (second, first)
        text = questions[verdict.question_id].text
        pairs.append(
            Pair(
                verdict.question_id,
                text,
                chosen.text,
                rejected.text,
                verdict.confidence,
                chosen.ids,
                rejected.ids,
                verdict.split,
            )
        )
    train = sum(p.split == Split.TRAIN for p in pairs)
    if train < FEWEST and not context.earlier:  # the better the policy, the fewer; earlier rounds have left some
        raise LoopError(_too_few(train, verdicts))
    context.store.write_shard("pairs", 0, pairs)
    return {"train": train, "held_out": len(pairs) - train}


def _too_few(train: int, verdicts: list[Verdict]) -> str:
    states = Counter(v.state.value for v in verdicts)
    seen = ", ".join(f"{state.value} {states.get(state.value, 0)}" for state in VerdictState)
    return (
        f"only {train} training pairs survived judging ({seen}); an evaluator needs at least {FEWEST}. Look at the judge's "
        "words with `selfeval show DIR dropped`; then try a stronger model, judge templates of its own, verdicts.working = "
        "true, or a lower verdicts.keep or verdicts.label_mass"
    )
