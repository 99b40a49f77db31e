"""Records for the tests of the figures: verdicts and pairs of replies to `What is N?`, of which one reply, N, is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from selfeval.evaluation.evaluator import JudgedPair
from selfeval.judging.protocol import Judgement
from selfeval.records import AgreementEvidence, PairwiseEvidence, Question, Reply, Split, Verdict, VerdictState

__all__ = ["KEPT", "QUESTIONS", "TIE", "UNPARSABLE", "UNSURE", "Gold", "judgement", "pair", "reply", "verdict", "voted"]

KEPT, TIE, UNSURE, UNPARSABLE = VerdictState.KEPT, VerdictState.TIE, VerdictState.UNSURE, VerdictState.UNPARSABLE


class Gold:
    """`What is N?` has one right reply, N; anything else has no gold."""

    name = "numbers"

    def is_right(self, question: str, reply: str) -> bool | None:
        number = question.removeprefix("What is ").removesuffix("?")
        return reply == number if number.isdigit() else None


QUESTIONS = {f"q{i}": Question(f"q{i}", f"What is {i}?", Split.TEST, "self") for i in range(8)}
QUESTIONS["love"] = Question("love", "What is love?", Split.TEST, "self")


def reply(name: str, text: str, ids: Sequence[int] = (5, 1), logprob: float = -1.0) -> Reply:
    return Reply(name, name.split("-")[0], text, tuple(ids), "sample", 1.0, 1.0, logprob, True)


def verdict(
    question: str = "q1",
    probability: float | None = 0.9,
    state: VerdictState = KEPT,
    split: Split = Split.TEST,
    ties: tuple[float | None, float | None] | None = None,
    **orders: float | None,
) -> Verdict:
    tie = None if probability is None else 0.0
    values: Any = {"in_order": probability, "swapped": probability, "tie": tie, "ties": ties or (tie, tie), **orders}
    tie = values.pop("tie")
    evidence = PairwiseEvidence(**values, raw_output=("", ""))
    return Verdict(question, split, f"{question}-r0", f"{question}-r1", state, probability, tie, evidence)


def voted(
    state: VerdictState, probability: float | None, tie: float | None = 0.0, *, share: float | None = 0.75, causes: Any = ()
) -> Verdict:
    """A verdict of the agreement judge by four votes; `causes` of those without an answer."""
    found = (*causes, *[None] * (4 - len(causes)))
    evidence = AgreementEvidence(("1", "2"), {"1": 3} if share else {}, share, share, share, found, ())
    return Verdict("q1", Split.TEST, "q1-r0", "q1-r1", state, probability, tie, evidence)


def pair(
    first: str, second: str, *, question: str = "q1", margin: float = 1.0, said: Verdict | None = None, gold: bool = True
) -> JudgedPair:
    """A judged pair; without `gold` there is no oracle."""
    replies = (reply(f"{question}-r0", first), reply(f"{question}-r1", second))
    text, oracle = QUESTIONS[question].text, Gold()
    right = (oracle.is_right(text, first), oracle.is_right(text, second)) if gold else None
    return JudgedPair(said or verdict(question), replies, margin, 0.0, right)


def judgement(in_order: float | None, swapped: float | None, tie: float | None = 0.0) -> Judgement:
    probability = None if in_order is None or swapped is None else (in_order + swapped) / 2
    evidence = PairwiseEvidence(in_order, swapped, (tie, tie), ("", ""))
    return Judgement(probability, None if probability is None else tie, evidence)
