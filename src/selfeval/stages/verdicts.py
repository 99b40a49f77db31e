"""verdicts: the judge compares two replies to each question, and abstains if it is not sure.

Pairs of test questions are judged too, for evaluation only: nothing trains on them. A user's own pairs are not judged.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.backbone.adapters import BASE
from selfeval.config import AgreementConfig, CombinedConfig, VerdictsConfig
from selfeval.judging.calibrated import rounded_judgement
from selfeval.judging.judges import make_judge
from selfeval.judging.protocol import UNFITTED, Comparison, JudgeFit, Judgement, state_of
from selfeval.quality.dedupe import normalise
from selfeval.records import Drop, Question, Reply, Split, Verdict, VerdictState
from selfeval.stages.context import Context
from selfeval.stages.draws import Draws
from selfeval.stages.given import Given, Labelled
from selfeval.stages.judge_fit import Judged, calibrate, calibrated_verdict, estimate_accuracies, forget_fit, known_fit
from selfeval.stages.judge_probe import forget_probe, probe_judge
from selfeval.stages.shards import Batch, ModelHandle, ShardOutput, StageShards, counting, map_shards

__all__ = ["JudgePairs", "ReplyPair", "compared", "draw_pair", "run", "without_dropped"]

ReplyPair = tuple[Question, Reply, Reply]


def compared(question: Question, first: Reply, second: Reply) -> Comparison:
    """Return the comparison of two replies, with the information which of them was cut off."""
    return Comparison(question.text, first.text, second.text, not first.finished, not second.finished, question.messages)


def without_dropped(replies: Iterable[Reply], drops: Iterable[Drop]) -> list[Reply]:
    """Return the replies without those that the stage replies dropped, such as loops."""
    # A drop of a whole shard names no reply: there are none.
    dropped = {drop.detail.get("reply") for drop in drops}
    return [reply for reply in replies if reply.id not in dropped]


def _pairs(context: Context, questions: Sequence[Question]) -> list[ReplyPair | Drop]:
    """Draw two distinct replies per question at random, without dropped ones; return a drop if there are no two."""
    by_question: dict[str, list[Reply]] = defaultdict(list)
    for reply in without_dropped(context.replies().values(), context.store.read_dropped("replies")):
        by_question[reply.question_id].append(reply)
    brought = context.given is not None and bool(context.given.replies)
    pairs: list[ReplyPair | Drop] = []
    for question in questions:
        replies = [r for r in by_question[question.id] if r.sampling_method == "file" or not brought]
        pairs.append(draw_pair(question, replies, context.draws))
    return pairs


def draw_pair(question: Question, replies: Sequence[Reply], draws: Draws) -> ReplyPair | Drop:
    """Draw two distinct replies to a question at random, in random order; return a drop if there are none."""
    if len(replies) < 2:
        return Drop("verdicts", "single_reply", question.text)
    # By the question's name: the pair does not depend on which other questions are judged.
    shuffled = list(replies)
    draws.random("pair", question.id).shuffle(shuffled)
    first, *others = shuffled
    # Replies that differ only in case, punctuation or spaces are no comparison.
    other = next((r for r in others if normalise(r.text) != normalise(first.text)), None)
    same = Drop("verdicts", "identical_replies", question.text, {"reply": first.text})
    return same if other is None else (question, first, other)


def _verdict(config: VerdictsConfig, question: Question, first: Reply, second: Reply, judgement: Judgement) -> Verdict:
    # The state is that of the rounded numbers, so a reader of the file finds the same.
    written = rounded_judgement(judgement)
    return Verdict(
        question_id=question.id,
        split=question.split,
        first=first.id,
        second=second.id,
        state=state_of(written, config),
        probability=written.probability,
        tie=written.tie,
        evidence=written.evidence,
    )


def _drop(question: Question, verdict: Verdict) -> Drop:
    detail: dict[str, Any] = {"probability": verdict.probability, "tie": verdict.tie}
    if verdict.evidence is not None:
        detail["raw_output"] = list(verdict.evidence.raw_output)
    if verdict.state == VerdictState.UNPARSABLE and verdict.evidence is not None:
        detail["causes"] = [None if cause is None else cause.value for cause in verdict.evidence.causes]
    return Drop("verdicts", verdict.state.value, question.text, detail)


@dataclass(frozen=True)
class JudgePairs:
    """Work of the stage: judge the pairs of a shard.

    Attributes:
        config: settings of the judge.
        batch_size: of sampling.
        seed: of what the judge samples.
        temperature: of a judge that is otherwise greedy; see `make_judge`. Default: 0.
        fit: what was estimated before; see `make_judge`. Default: nothing.
    """

    config: VerdictsConfig
    batch_size: int
    seed: int
    temperature: float = 0.0
    fit: JudgeFit = UNFITTED

    def __call__(self, model: ModelHandle, batch: Batch[ReplyPair | Drop]) -> ShardOutput:
        """Return a verdict for each pair; one that is not kept is listed among the drops too."""
        pairs = [p for p in batch.records if not isinstance(p, Drop)]
        drops = [p for p in batch.records if isinstance(p, Drop)]
        judgements = self._judge(model, [compared(q, a, b) for q, a, b in pairs])
        verdicts = [_verdict(self.config, q, a, b, j) for (q, a, b), j in zip(pairs, judgements, strict=True)]
        return _output([question for question, _, _ in pairs], verdicts, drops)

    def _judge(self, model: ModelHandle, comparisons: Sequence[Comparison]) -> list[Judgement]:
        judge = make_judge(
            model.backbone,
            model.templates,
            self.config,
            batch_size=self.batch_size,
            seed=self.seed,
            temperature=self.temperature,
            answers=model.answers,
            fit=self.fit,
        )
        with model.backbone.acting_as(BASE):
            return judge.judge(comparisons, counting(model.report_progress, len(comparisons) * _prompts_per_pair(self.config)))


def _prompts_per_pair(config: VerdictsConfig) -> int:
    """Return how many prompts a judge counts for a pair, at most: equal ones are judged once."""
    settings = config.settings
    if isinstance(settings, CombinedConfig):
        return sum(map(_prompts_per_pair, config.members))
    # The agreement judge votes on the question; others read two replies, or both orders of them.
    return settings.votes if isinstance(settings, AgreementConfig) else 2 * config.votes


def _take_given(context: Context, given: Given, questions: Sequence[Question]) -> None:
    """Convert the user's pairs to verdicts without a judge. Take one pair per test question, so each counts once."""
    replies: dict[str, dict[str, Reply]] = defaultdict(dict)
    for reply in context.replies().values():
        if reply.sampling_method == "file":
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
    questions, config = context.store.read("questions", Question), context.config
    forget_probe(context)
    if context.given and context.given.pairs:
        forget_fit(context)
        _take_given(context, context.given, questions)
        return _counts(context)
    work = JudgePairs(config.verdicts, config.backbone.rollout_batch_size, context.round_seed)
    shards = StageShards(context.store, context.terminal, "verdicts", drops=True, poisoned=config.scale.poisoned)
    pairs = _pairs(context, questions)
    drawn = [pair for pair in pairs if not isinstance(pair, Drop)]
    probe_judge(context, drawn, work)
    fit = known_fit(context)
    if fit is None and isinstance(config.verdicts.settings, CombinedConfig):
        fit = estimate_accuracies(context, config.verdicts.settings, drawn, work) if drawn else UNFITTED
    elif fit is None:
        fit, judged = calibrate(context, pairs, work)
        _write_calibrated(context, fit, judged)
    map_shards(shards, pairs, config.verdicts.shard, dataclasses.replace(work, fit=fit), context.executor)
    return _counts(context)


def _write_calibrated(context: Context, fit: JudgeFit, judged: Judged) -> None:
    """Write the shards from which the calibration was fitted, except finished ones: they need not be judged again."""
    finished = {path.name for path in context.store.shards("verdicts")}
    for batch, output in judged:
        if context.store.shard_path("verdicts", batch.index).name in finished:
            continue
        verdicts = [calibrated_verdict(v, fit.calibration, context.config.verdicts) for v in output.records]
        pairs = [pair for pair in batch.records if not isinstance(pair, Drop)]
        drops = [pair for pair in batch.records if isinstance(pair, Drop)]
        found = _output([question for question, _, _ in pairs], verdicts, drops)
        context.store.write_shard("verdicts", batch.index, found.records, found.drops)


def _output(questions: Sequence[Question], verdicts: Sequence[Verdict], drops: Sequence[Drop]) -> ShardOutput:
    """Return a shard. Verdicts that are not kept are drops too, and stay in the shard: evaluation counts them by state."""
    unkept = [_drop(q, v) for q, v in zip(questions, verdicts, strict=True) if v.state != VerdictState.KEPT]
    return ShardOutput(verdicts, [*drops, *unkept])


def _counts(context: Context) -> dict[str, int]:
    states = Counter(v.state.value for v in context.store.read("verdicts", Verdict))
    return {"judged": sum(states.values()), **{state.value: states.get(state.value, 0) for state in VerdictState}}
