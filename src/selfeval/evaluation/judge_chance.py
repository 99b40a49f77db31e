"""Test a judge against chance: exact tests on its verdicts that a judge without knowledge of the replies would not pass.

Each test has one unit per question, and is the exact binomial test of wins against losses of `quality/comparisons.py`:

- `labels_against_chance`: kept verdicts on pairs of which one reply is right and the other is wrong, by any source that did not
  judge (gold, or the majority answer of a vote). A guess is right half of the time, because the replies are in random order.
- `orders_against_chance`: pairs whose orders both chose a reply. A judge that chooses at random, or by position, agrees with
  itself in the other order at most half of the time: with a share b of first choices, 2 b (1 - b) <= 1/2.
- `members_against_chance`: whether the members of a combined judge choose the same reply. Judges that choose without regard to
  the replies, independently of each other, do so half of the time.
- `votes_against_chance`: whether a reply has the majority answer of its question more often than that of another one. A
  model whose answers do not depend on the question has both equally often.
- `lengths_against_chance`: whether kept verdicts choose the longer reply. A judge that always does is a rule.

None of the last four shows that a judge is right. Without any source of right answers, they are necessary conditions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfeval.evaluation.verdicts import label_is_right
from selfeval.judging.choices import choices_of
from selfeval.quality.comparisons import Comparison, compare_paired, compare_with_level
from selfeval.records import AgreementEvidence, CombinedEvidence, Reply, Verdict, VerdictState

__all__ = [
    "Right",
    "labels_against_chance",
    "lengths_against_chance",
    "majority_of",
    "members_against_chance",
    "orders_against_chance",
    "right_by_majority",
    "votes_against_chance",
]

Right = tuple[bool | None, bool | None]
"""Whether each of two replies is right; None if it is not known."""


def labels_against_chance(verdicts: Sequence[Verdict], right: Sequence[Right]) -> Comparison:
    """Compare the share of right labels with one half.

    Args:
        verdicts: [N], verdicts of the judge, one per question; only kept ones count.
        right: [N], whether each reply of these pairs is right; only pairs with one right reply count.

    Returns:
        The share of right labels minus one half.
    """
    rows = zip(verdicts, right, strict=True)
    decided = [label_is_right(v, r) for v, r in rows if v.state == VerdictState.KEPT and {*r} == {True, False}]
    return compare_with_level([float(found) for found in decided if found is not None])


def orders_against_chance(verdicts: Sequence[Verdict]) -> Comparison:
    """Compare the share of pairs on which both orders chose the same reply with one half.

    Pairs with an order that chose neither, or that was not asked or not read, do not count.

    Args:
        verdicts: verdicts of the judge, one per question, in any state.

    Returns:
        The share minus one half; without cases for a judge that has no orders.
    """
    chosen = [choices for v in verdicts if set(choices := choices_of(v)) <= {"first", "second"}]
    return compare_with_level([float(first == second) for first, second in chosen])


def members_against_chance(verdicts: Sequence[Verdict]) -> Comparison:
    """Compare how often two members of a combined judge choose the same reply with one half.

    Args:
        verdicts: verdicts of a combined judge, one per question; others do not count.

    Returns:
        The share minus one half, with the first two members that vote on a pair; without cases for other judges.
    """
    votes = [[v for v in verdict.evidence.votes if v] for verdict in verdicts if isinstance(verdict.evidence, CombinedEvidence)]
    return compare_with_level([float(first == second) for first, second, *_ in (v for v in votes if len(v) > 1)])


def votes_against_chance(verdicts: Sequence[Verdict]) -> Comparison:
    """Compare how often a reply has the majority answer of its question and that of the next question.

    The replies do not vote, so they are a test of the vote: if answers depend on nothing but the model, exchanging the
    questions changes nothing. This is a permutation test with one permutation, the cyclic shift.

    Args:
        verdicts: verdicts of a judge that holds a vote, one per question; others do not count.

    Returns:
        The mean share of the two replies that have the majority answer of their question, minus that of the next question.
    """
    held = [(v.evidence, majority_of(v)) for v in verdicts]
    answered = [(e.answers, answer) for e, answer in held if isinstance(e, AgreementEvidence) and answer is not None]
    if len(answered) < 2:
        return compare_paired([], [])
    others = [answered[(place + 1) % len(answered)][1] for place in range(len(answered))]
    own = [_share(answers, answer) for answers, answer in answered]
    return compare_paired(own, [_share(answers, other) for (answers, _), other in zip(answered, others, strict=True)])


def lengths_against_chance(verdicts: Sequence[Verdict], replies: Mapping[str, Reply]) -> Comparison:
    """Compare the share of kept verdicts that chose the reply with more tokens with one half; equal lengths do not count.

    Args:
        verdicts: verdicts of the judge, one per question.
        replies: replies by id.
    """
    scores = []
    for v in verdicts:
        first, second = len(replies[v.first].ids), len(replies[v.second].ids)
        if v.state == VerdictState.KEPT and v.probability is not None and first != second:
            scores.append(float((v.probability > 0.5) == (first > second)))
    return compare_with_level(scores)


def majority_of(verdict: Verdict) -> str | None:
    """Return the answer of more than half of all votes; None without a vote, or if no answer has as many."""
    evidence = verdict.evidence
    if not isinstance(evidence, AgreementEvidence) or not evidence.votes:
        return None
    answer, most = max(evidence.votes.items(), key=lambda found: found[1])
    # Votes without an answer count among all votes.
    return answer if 2 * most > len(evidence.causes) else None


def right_by_majority(verdict: Verdict) -> Right:
    """Return whether each reply of a pair has the majority answer of a vote; (None, None) without a majority."""
    answer, evidence = majority_of(verdict), verdict.evidence
    if answer is None or not isinstance(evidence, AgreementEvidence):
        return None, None
    first, second = evidence.answers
    return first == answer, second == answer


def _share(answers: tuple[str | None, str | None], answer: str) -> float:
    return sum(found == answer for found in answers) / 2
