"""Figures of a check, each with its n and its 95% interval: questions, replies, and every judge.

Of a judge:

- parse rate, swap consistency and position bias, as in the report of a run;
- test-retest agreement: whether two judgements of a pair prefer the same reply, among pairs on which at least one prefers one.
  The second one has another seed; a judge that is otherwise greedy is sampled;
- accuracy: the share of right labels among kept verdicts on pairs of which one reply is right, by gold, and by the majority
  answer of a judge that holds a vote;
- the gap between recognising and producing (generation-verification gap: Song et al. 2024, https://arxiv.org/abs/2412.02674):

      gap = mean over pairs of right(the reply that the judge prefers) - (right(first) + right(second)) / 2

  This is best-of-n by the judge minus the mean reply, with n = 2, the pairs that a run judges. A judge without a preference
  has the mean of both. Right is by gold, and without gold by the majority answer of another judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from selfeval.config import AgreementConfig
from selfeval.evaluation.judge_chance import (
    Right,
    labels_against_chance,
    lengths_against_chance,
    members_against_chance,
    orders_against_chance,
    right_by_majority,
    votes_against_chance,
)
from selfeval.evaluation.judge_probe import diagnose
from selfeval.judging.choices import is_consistent
from selfeval.judging.loops import ends_in_loop
from selfeval.quality.comparisons import LEVEL, Comparison, compare_paired
from selfeval.quality.statistics import Figure, proportion
from selfeval.records import AgreementEvidence, Verdict, VerdictState
from selfeval.report.schema import JudgeProbe
from selfeval.suitability.candidates import Candidate
from selfeval.suitability.sampling import Judged, Sample

__all__ = ["JudgeMeasures", "Measures", "QuestionMeasures", "ReplyMeasures", "Source", "measure"]

Source = Literal["gold", "majority"]
"""Where right answers come from."""
Oracle = Callable[[str, str], bool | None]
"""Returns whether a reply to a question is right; None if that is not known."""


@dataclass(frozen=True)
class QuestionMeasures:
    """The questions that the model wrote.

    Attributes:
        usable: share of the samples that became a question; None if the questions are the user's.
        drops: number of dropped samples by reason.
        in_domain: share of the questions that the oracle of the domain knows; None without such an oracle.
        from_seeds: number of seeds that were replied to because too few questions were usable.
        examples: the first questions.
    """

    usable: Figure | None
    drops: dict[str, int]
    in_domain: Figure | None
    from_seeds: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class ReplyMeasures:
    """The replies.

    Attributes:
        cut: share that the token limit cut off.
        loops: share that was cut off while it repeated a block of text.
        identical: share of the questions whose replies are all equal.
        right: share of right replies by gold; None without gold.
    """

    cut: Figure
    loops: Figure
    identical: Figure
    right: Figure | None


@dataclass(frozen=True)
class JudgeMeasures:
    """One judge.

    Attributes:
        name: name of the judge, and of its variant.
        assignments: values of `--set` that select it.
        probe: diagnosis of all its verdicts, as at the start of a run.
        parsed: share of the pairs with a readable verdict.
        kept: share of the pairs that are kept at the thresholds of the run.
        retest: test-retest agreement; None for a judge that writes nothing, which always repeats itself.
        gold: share of right labels by gold against one half; None without gold.
        majority: the same by the majority answer; None without a vote that beats chance, and for a judge that holds it, or that
            has a member that does.
        gap: best of two by the judge against the mean reply; None without right answers.
        gap_source: where the right answers of `gap` come from; None without any.
        orders: consistent choices against one half; None for a judge without orders.
        votes: majority answers of the own question against another one's; None for a judge without a vote.
        lengths: choices of the longer reply against one half.
        seconds_per_pair: time of a verdict, in batches of this check.
        members: equal choices of two members of a combined judge against one half; None for another judge. Default: None.
    """

    name: str
    assignments: tuple[str, ...]
    probe: JudgeProbe
    parsed: Figure
    kept: Figure
    retest: Figure | None
    gold: Comparison | None
    majority: Comparison | None
    gap: Comparison | None
    gap_source: Source | None
    orders: Comparison | None
    votes: Comparison | None
    lengths: Comparison
    seconds_per_pair: float | None
    members: Comparison | None = None

    def as_json(self) -> dict[str, Any]:
        compared = {name: getattr(self, name) for name in ("gold", "majority", "gap", "orders", "votes", "members", "lengths")}
        return {
            "name": self.name,
            "settings": list(self.assignments),
            "probe": self.probe.as_json(),
            "parsed": self.parsed.as_json(),
            "kept": self.kept.as_json(),
            "retest": None if self.retest is None else self.retest.as_json(),
            "gap_source": self.gap_source,
            **{name: None if found is None else found.as_json() for name, found in compared.items()},
            "seconds_per_pair": self.seconds_per_pair,
        }


@dataclass(frozen=True)
class Measures:
    """All figures of a check."""

    questions: QuestionMeasures
    replies: ReplyMeasures
    judges: tuple[JudgeMeasures, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        questions, replies = self.questions, self.replies
        return {
            "questions": {
                "usable": _json(questions.usable),
                "drops": questions.drops,
                "in_domain": _json(questions.in_domain),
                "from_seeds": questions.from_seeds,
                "examples": list(questions.examples),
            },
            "replies": {name: _json(getattr(replies, name)) for name in ("cut", "loops", "identical", "right")},
            "judges": [judge.as_json() for judge in self.judges],
        }


def _json(figure: Figure | None) -> dict[str, float | int | None] | None:
    return None if figure is None else figure.as_json()


def measure(sample: Sample, candidates: Sequence[Candidate], oracle: Oracle | None, *, knows_domain: bool) -> Measures:
    """Compute all figures of a sample.

    Args:
        sample: the sample.
        candidates: its judges.
        oracle: Optional. Gold.
        knows_domain: whether a question that `oracle` does not know is outside of the domain. A file of answers knows only its
            own questions.
    """
    gold = _Gold(sample, oracle)
    majorities = _majorities(sample)
    judges = tuple(_judge(sample, c, sample.judged[c.name], gold, majorities) for c in candidates)
    return Measures(_questions(sample, gold if knows_domain else None), _replies(sample, gold), judges)


class _Gold:
    """Asks gold once about each reply."""

    def __init__(self, sample: Sample, oracle: Oracle | None) -> None:
        texts = {question.id: question.text for question in sample.asked}
        self.right = {} if oracle is None else {r.id: oracle(texts[r.question_id], r.text) for r in sample.replies}
        self.is_there = any(found is not None for found in self.right.values())

    def of(self, verdict: Verdict) -> Right:
        return self.right.get(verdict.first), self.right.get(verdict.second)


def _questions(sample: Sample, gold: _Gold | None) -> QuestionMeasures:
    usable = [True] * len(sample.questions) + [False] * len(sample.dropped)
    drops = dict(Counter(drop.reason for drop in sample.dropped).most_common())
    written = {question.id for question in sample.questions}
    known = {r.question_id: gold.right[r.id] is not None for r in sample.replies if r.question_id in written} if gold else {}
    return QuestionMeasures(
        proportion(usable) if usable else None,
        drops,
        proportion(list(known.values())) if gold else None,
        sum(question.source == "seed" for question in sample.asked),
        tuple(question.text for question in sample.questions[:3]),
    )


def _replies(sample: Sample, gold: _Gold) -> ReplyMeasures:
    cut = [not reply.finished for reply in sample.replies]
    loops = [not reply.finished and ends_in_loop(reply.ids) for reply in sample.replies]
    identical = [True] * sample.identical + [False] * len(sample.pairs)
    known = [found for found in gold.right.values() if found is not None]
    return ReplyMeasures(proportion(cut), proportion(loops), proportion(identical), proportion(known) if known else None)


def _majorities(sample: Sample) -> list[Right] | None:
    """Return the right replies by the majority answer, in the order of the pairs; None without a vote that beats chance.

    A vote whose answers do not depend on the question says nothing about who is right.
    """
    for judged in sample.judged.values():
        found = _votes(judged.verdicts)
        if found is not None and found.finding == "better" and found.p_value is not None and found.p_value <= LEVEL:
            return [right_by_majority(verdict) for verdict in judged.verdicts]
    return None


def _judge(
    sample: Sample, candidate: Candidate, judged: Judged, gold: _Gold, majorities: Sequence[Right] | None
) -> JudgeMeasures:
    verdicts = judged.verdicts
    votes, orders, members = _votes(verdicts), orders_against_chance(verdicts), candidate.config.verdicts.members
    right_of: dict[Source, list[Right]] = {"gold": [gold.of(v) for v in verdicts]} if gold.is_there else {}
    if majorities and not any(isinstance(member.settings, AgreementConfig) for member in members):
        right_of["majority"] = list(majorities)
    accuracy = {source: _accuracy(verdicts, right) for source, right in right_of.items()}
    source = next(iter(right_of), None)
    probe = diagnose(verdicts, candidate.config)
    return JudgeMeasures(
        name=candidate.name,
        assignments=candidate.assignments,
        probe=probe,
        parsed=proportion([v.state != VerdictState.UNPARSABLE for v in verdicts]),
        kept=proportion([v.state == VerdictState.KEPT for v in verdicts]),
        retest=_retest(judged) if candidate.is_sampled else None,
        gold=accuracy.get("gold"),
        majority=accuracy.get("majority"),
        gap=None if source is None else _gap(verdicts, right_of[source]),
        gap_source=source,
        # A judge without orders has no consistency, whatever it says.
        orders=orders if any(is_consistent(v) is not None for v in verdicts) else None,
        votes=votes,
        lengths=lengths_against_chance(verdicts, {reply.id: reply for reply in sample.replies}),
        seconds_per_pair=judged.seconds / len(verdicts) if verdicts else None,
        members=members_against_chance(verdicts) if len(members) > 1 else None,
    )


def _votes(verdicts: Sequence[Verdict]) -> Comparison | None:
    voted = any(isinstance(v.evidence, AgreementEvidence) for v in verdicts)
    return votes_against_chance(verdicts) if voted else None


def _accuracy(verdicts: Sequence[Verdict], right: Sequence[Right]) -> Comparison:
    known = min(len(verdicts), len(right))  # another judge may have judged fewer pairs
    return labels_against_chance(verdicts[:known], right[:known])


def _retest(judged: Judged) -> Figure:
    pairs = zip(judged.verdicts, judged.retests, strict=False)  # fewer were judged again
    preferred = [(_preference(a), _preference(b)) for a, b in pairs if None not in (a.probability, b.probability)]
    # Two judgements that both prefer neither agree without a preference: a judge that is always unsure would agree fully.
    return proportion([a == b for a, b in preferred if (a, b) != ("neither", "neither")])


def _preference(verdict: Verdict) -> str:
    p = verdict.probability
    if verdict.state == VerdictState.TIE or p is None or p == 0.5:
        return "neither"
    return "first" if p > 0.5 else "second"


def _gap(verdicts: Sequence[Verdict], right: Sequence[Right]) -> Comparison:
    best, mean = [], []
    for verdict, (first, second) in zip(verdicts, right, strict=False):  # votes of fewer pairs are known
        if first is None or second is None:
            continue
        mean.append((first + second) / 2)
        p = verdict.probability
        best.append(mean[-1] if p is None or p == 0.5 else float(first if p > 0.5 else second))
    return compare_paired(best, mean)
