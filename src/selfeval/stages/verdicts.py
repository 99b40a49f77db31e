"""verdicts: the judge compares two replies to each question, and abstains if it is not sure.

Pairs of test questions are judged too, for evaluation only: nothing trains on them. A user's own pairs are not judged.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.judging.protocol import Comparison, Judgement, state_of
from selfeval.quality.dedupe import normalise
from selfeval.quality.statistics import rounded
from selfeval.records import Drop, PairwiseEvidence, Question, Reply, Split, Verdict, VerdictState
from selfeval.stages.context import Context
from selfeval.stages.given import Given, Labelled

__all__ = ["run"]


def _pairs(context: Context, questions: Sequence[Question]) -> list[tuple[Question, Reply, Reply] | Drop]:
    """Draw two distinct replies per question at random; return a drop if all replies are equal."""
    by_question: dict[str, list[Reply]] = defaultdict(list)
    for reply in context.replies().values():
        by_question[reply.question_id].append(reply)
    brought = context.given is not None and bool(context.given.replies)
    pairs: list[tuple[Question, Reply, Reply] | Drop] = []
    for question in questions:
        replies = [r for r in by_question[question.id] if r.way == "file" or not brought]
        if len(replies) < 2:
            pairs.append(Drop("verdicts", "single_reply", question.text))
            continue
        context.random("pair", question.id).shuffle(replies)
        first = replies[0]
        other = next((r for r in replies[1:] if normalise(r.text) != normalise(first.text)), None)
        same = Drop("verdicts", "identical_replies", question.text, {"reply": first.text})
        pairs.append(same if other is None else (question, first, other))
    return pairs


def _verdict(context: Context, question: Question, first: Reply, second: Reply, judgement: Judgement) -> Verdict:
    state = state_of(judgement, context.config.verdicts)
    return Verdict(
        question_id=question.id,
        split=question.split,
        first=first.id,
        second=second.id,
        state=state,
        probability=rounded(judgement.probability),
        tie=rounded(judgement.tie),
        evidence=_rounded(judgement.evidence),
    )


def _rounded(evidence: PairwiseEvidence | None) -> PairwiseEvidence | None:
    if evidence is None:
        return None
    in_order, swapped, *ties = map(rounded, (evidence.in_order, evidence.swapped, *evidence.ties))
    return PairwiseEvidence(in_order, swapped, (ties[0], ties[1]), evidence.raw_output)


def _drop(question: Question, verdict: Verdict) -> Drop:
    detail: dict[str, Any] = {"probability": verdict.probability, "tie": verdict.tie}
    if verdict.evidence is not None:
        detail["raw_output"] = list(verdict.evidence.raw_output)
    return Drop("verdicts", verdict.state.value, question.text, detail)


def _write_shard(context: Context, shard: int, pairs: Sequence[tuple[Question, Reply, Reply] | Drop]) -> None:
    judged = [p for p in pairs if not isinstance(p, Drop)]
    drops = [p for p in pairs if isinstance(p, Drop)]
    with context.backbone.acting_as(BASE):
        judgements = context.judge().judge([Comparison(q.text, a.text, b.text) for q, a, b in judged])
    verdicts = [_verdict(context, q, a, b, j) for (q, a, b), j in zip(judged, judgements, strict=True)]
    unkept = [_drop(q, v) for (q, _, _), v in zip(judged, verdicts, strict=True) if v.state != VerdictState.KEPT]
    context.store.write_shard("verdicts", shard, verdicts, [*drops, *unkept])


def _take_given(context: Context, given: Given, questions: Sequence[Question]) -> None:
    """Convert the user's pairs to verdicts without a judge. Take one pair per test question, so each counts once."""
    replies: dict[str, dict[str, Reply]] = defaultdict(dict)
    for reply in context.replies().values():
        if reply.way == "file":
            replies[reply.question_id][reply.text] = reply
    verdicts, drops = [], []
    for question in questions:
        pairs, there = given.pairs.get(question.id, ()), replies[question.id]
        fitting = [pair for pair in pairs if pair.chosen in there and pair.rejected in there]
        used = fitting if question.split == Split.TRAIN else fitting[:1]
        verdicts += [_as_verdict(context, question, pair, there) for pair in used]
        drops += [Drop("verdicts", "too_long", question.text)] * (len(pairs) - len(fitting))
        drops += [Drop("verdicts", "second_pair_of_a_test_question", question.text)] * (len(fitting) - len(used))
    context.store.write_shard("verdicts", 0, verdicts, drops)


def _as_verdict(context: Context, question: Question, pair: Labelled, replies: Mapping[str, Reply]) -> Verdict:
    """Return a pair in random order, because the position must not reveal the preference."""
    chosen, rejected = replies[pair.chosen].id, replies[pair.rejected].id
    turned = context.random("order", question.id, chosen, rejected).random() < 0.5
    return Verdict(
        question_id=question.id,
        split=question.split,
        first=rejected if turned else chosen,
        second=chosen if turned else rejected,
        state=VerdictState.KEPT,
        probability=1.0 - pair.confidence if turned else pair.confidence,
        tie=None,
        evidence=None,
    )


def run(context: Context) -> dict[str, int]:
    """Judge one pair per question; return the number of verdicts in each state."""
    questions, size = context.store.read("questions", Question), context.config.verdicts.shard
    if context.given and context.given.pairs:
        _take_given(context, context.given, questions)
        return _counts(context)
    pairs = _pairs(context, questions)
    shards = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    done = [i for i in range(len(shards)) if context.store.has_shard("verdicts", i, drops=True)]
    with context.terminal.bar("verdicts", len(pairs), sum(len(shards[i]) for i in done)) as bar:
        for index, shard in enumerate(shards):
            if index not in done:
                _write_shard(context, index, shard)
                bar.advance(len(shard))
    return _counts(context)


def _counts(context: Context) -> dict[str, int]:
    states = Counter(v.state.value for v in context.store.read("verdicts", Verdict))
    return {"judged": sum(states.values()), **{state.value: states.get(state.value, 0) for state in VerdictState}}
