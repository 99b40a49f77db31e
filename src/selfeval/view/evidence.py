"""How a judge arrived at a verdict, in words: its outputs, probabilities, grades and votes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from selfeval.records import (
    AgreementEvidence,
    CombinedEvidence,
    Evidence,
    PairwiseEvidence,
    PointwiseEvidence,
    SampledPairwiseEvidence,
    SampledPointwiseEvidence,
    Unreadable,
    Verdict,
)
from selfeval.report.figures import number, percent
from selfeval.report.sections import CAUSES, MEANINGS

__all__ = ["Output", "Reason", "explain", "verdict_sentence"]


@dataclass(frozen=True)
class Output:
    """A text that the judge wrote.

    Attributes:
        title: what was asked.
        facts: names and values of what was read from it.
        cause: why it could not be read, or was read after it was cut off; empty otherwise.
        text: the text; None if it was not kept.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    cause: str
    text: str | None


@dataclass(frozen=True)
class Reason:
    """The evidence of one judge.

    Attributes:
        title: name of the judge in a combined one; empty otherwise.
        facts: names and values that concern the whole verdict.
        outputs: its texts.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    outputs: tuple[Output, ...]


def verdict_sentence(verdict: Verdict) -> str:
    """Say the state of a verdict and what it means."""
    return MEANINGS[verdict.state.value]


def explain(evidence: Evidence | None) -> list[Reason]:
    """Return the evidence of each judge; empty if there is none."""
    if evidence is None:
        return []
    if isinstance(evidence, CombinedEvidence):
        return list(_combined(evidence))
    return [_one(evidence)]


def _one(evidence: PairwiseEvidence | AgreementEvidence | PointwiseEvidence) -> Reason:
    if isinstance(evidence, PairwiseEvidence):
        return Reason("", (), tuple(_order(evidence, place) for place in (0, 1)))
    if isinstance(evidence, PointwiseEvidence):
        return Reason("", (), tuple(_grading(evidence, place) for place in (0, 1)))
    return _votes(evidence)


def _combined(evidence: CombinedEvidence) -> Iterator[Reason]:
    rows = zip(evidence.judges, evidence.probabilities, evidence.votes, evidence.accuracies, evidence.members, strict=True)
    for name, probability, vote, accuracy, member in rows:
        facts = (
            ("vote", {1: "first", -1: "second"}.get(vote, "abstains")),
            ("probability of the first reply", _share(probability)),
            ("estimated accuracy of its votes", percent(accuracy)),
        )
        inner = Reason("", (), ()) if member is None else _one(member)
        yield Reason(name, (*facts, *inner.facts), inner.outputs)


def _order(evidence: PairwiseEvidence, place: int) -> Output:
    probability = (evidence.in_order, evidence.swapped)[place]
    facts = [
        ("first reply better", _share(probability)),
        ("neither better", _share(evidence.ties[place])),
        ("all labels together", _share(evidence.label_masses[place])),
    ]
    if isinstance(evidence, SampledPairwiseEvidence):
        facts += [
            ("readable votes", f"{evidence.readable_votes[place]:,}"),
            ("entropy of the votes", _nats(evidence.vote_entropies[place])),
        ]
    title = ("In order: the first reply is shown first", "Swapped: the second reply is shown first")[place]
    return Output(title, tuple(facts), _cause(evidence.causes[place]), evidence.raw_output[place])


def _grading(evidence: PointwiseEvidence, place: int) -> Output:
    grade = evidence.grades[place]
    facts = [
        ("grade", "–" if grade is None else number(grade)),
        ("probabilities of the grades", ", ".join(_share(p) for p in evidence.distributions[place]) or "–"),
        ("all grades together", _share(evidence.label_masses[place])),
    ]
    if isinstance(evidence, SampledPointwiseEvidence):
        facts += [
            ("readable votes", f"{evidence.readable_votes[place]:,}"),
            ("entropy of the votes", _nats(evidence.vote_entropies[place])),
        ]
    title = ("Grade of the first reply", "Grade of the second reply")[place]
    return Output(title, tuple(facts), _cause(evidence.causes[place]), evidence.raw_output[place])


def _votes(evidence: AgreementEvidence) -> Reason:
    votes = ", ".join(f"{answer} ({count:,})" for answer, count in evidence.votes.items())
    first, second = ("none" if answer is None else answer for answer in evidence.answers)
    causes = sorted({cause for cause in evidence.causes if cause is not None})
    facts = (
        ("answer of the first reply", first),
        ("answer of the second reply", second),
        ("votes", votes or "none with an answer"),
        ("share of the most frequent answer", _share(evidence.share)),
        *(("votes", f"{evidence.causes.count(cause):,} {CAUSES[cause]}") for cause in causes),
    )
    return Reason("", facts, tuple(Output("A vote without an answer", (), "", text) for text in evidence.raw_output))


def _cause(cause: Unreadable | None) -> str:
    return "" if cause is None else f"The output was one {CAUSES[cause.value]}."


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{number(value)} nats"
