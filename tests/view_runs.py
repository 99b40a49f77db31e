"""A finished run without a model: records of every kind, and the report that the real figures make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfeval.config import RunConfig
from selfeval.evaluation.evaluator import (
    EvaluatorFacts,
    JudgedPair,
    measure_evaluator,
    measure_first_pairs,
    rights_of,
)
from selfeval.evaluation.policy import Answered, Outcome, measure_policy, sample_of
from selfeval.evaluation.replies import measure_replies
from selfeval.evaluation.verdicts import measure_verdicts
from selfeval.records import (
    ComparedReplies,
    Drop,
    Pair,
    PairwiseEvidence,
    Question,
    ReferenceAnswer,
    Reply,
    Sampled,
    ScoredPair,
    Seed,
    Split,
    Unreadable,
    Verdict,
    VerdictState,
)
from selfeval.report.page import draw_page
from selfeval.report.schema import Alarm, Data, Dropped, Memory, Model, Report, Time
from selfeval.store import RUN_SCHEMA, RunStore

__all__ = ["QUESTIONS", "ViewRun", "make_view_run"]

QUESTIONS = 24
"""Number of questions; every third one is of the test."""
_STATES = (VerdictState.KEPT, VerdictState.KEPT, VerdictState.TIE, VerdictState.UNSURE, VerdictState.UNPARSABLE)
_OUTCOMES: tuple[Outcome, ...] = ("win", "win", "tie", "loss", "unparsable")
_STEPS = 4


class ViewRun:
    """The records of the run, all of them made from the number of their question.

    Args:
        questions: number of questions.
        text: added to every question and reply. Default: nothing.
    """

    def __init__(self, questions: int = QUESTIONS, text: str = "") -> None:
        numbers = range(questions)
        self.questions = [
            Question(f"q{n}", f"What is {n} plus {n}?{text}", Split.TEST if n % 3 == 0 else Split.TRAIN, "self")
            for n in numbers
        ]
        self.replies = [self._reply(n, place, text) for n in numbers for place in (0, 1)]
        self.by_id = {reply.id: reply for reply in self.replies}
        self.reference_answers = [ReferenceAnswer(f"q{n}", f"It is {2 * n}.") for n in numbers]
        self.verdicts = [self._verdict(q, n) for n, q in enumerate(self.questions) if n % 7 != 6]
        self.pairs = [self._pair(v) for v in self.verdicts if v.state == VerdictState.KEPT]
        test = [v for v in self.verdicts if v.split == Split.TEST]
        self.judged = [self._judged(v, n) for n, v in enumerate(test)]
        self.scored = [
            ScoredPair(
                *(p.verdict.question_id, p.verdict.first, p.verdict.second, p.verdict.state, p.verdict.probability),
                *(p.margin, p.disagreement, *(p.right or (None, None))),
            )
            for p in self.judged
        ]
        self.compared = [self._compared(q, n) for n, q in enumerate(q for q in self.questions if q.split == Split.TEST)]
        self.sampled = [
            Sampled(step, f"q{n}", f"step {step}: {2 * n}", step / 4 - n / 8, finished=n % 2 == 0)
            for step in range(1, _STEPS + 1)
            for n in (1, 2, 4)
        ]
        self.seeds = [Seed("What is 1 plus 1?", "It is 2."), Seed("What is 2 plus 2?")]
        asked = {q.id: q for q in self.questions}
        self.dropped_questions = [
            Drop("questions", "near_duplicate", "What is 1 plus one?", {"of": "q1"}),
            Drop("questions", "too_short", "Why?"),
        ]
        self.dropped_verdicts = [
            Drop("verdicts", v.state.value, asked[v.question_id].text, {"probability": v.probability})
            for v in self.verdicts
            if v.state != VerdictState.KEPT
        ]

    def _reply(self, n: int, place: int, text: str) -> Reply:
        finished, method = (n + place) % 5 != 4, "beam" if n % 4 == 3 else "sample"
        return Reply(
            *(f"q{n}-r{place}", f"q{n}", f"The answer is {2 * n + place}.{text}", (5,) * (n + place) + (1,)),
            *(method, 1.0, 1.0, -float(n), finished),
        )

    def _verdict(self, question: Question, n: int) -> Verdict:
        state = _STATES[n % len(_STATES)]
        low = (n % 9) / 100
        probability, tie = {
            VerdictState.KEPT: (0.99 - low if n % 2 else 0.01 + low, 0.001),
            VerdictState.TIE: (0.5, 0.9),
            VerdictState.UNSURE: (0.55, 0.1),
            VerdictState.UNPARSABLE: (None, None),
        }[state]
        orders: Any = (None if probability is None else probability, 0.2 if state == VerdictState.UNSURE else probability)
        cause = Unreadable.CUT if n % 2 else Unreadable.REFUSED
        causes = (None, None) if probability is not None else (cause, cause) if n % 3 else (None, cause)
        evidence = PairwiseEvidence(*orders, (tie, tie), (f"Judge says {n} [A]", f"Judge says {n} [B]"), causes, (0.9, 0.8))
        return Verdict(question.id, question.split, f"{question.id}-r0", f"{question.id}-r1", state, probability, tie, evidence)

    def _pair(self, verdict: Verdict) -> Pair:
        first, second = self.by_id[verdict.first], self.by_id[verdict.second]
        chosen, rejected = (first, second) if (verdict.probability or 0) > 0.5 else (second, first)
        return Pair(
            *(verdict.question_id, f"Question: {verdict.question_id}", chosen.text, rejected.text, verdict.confidence),
            *(chosen.ids, rejected.ids, verdict.split),
        )

    def _judged(self, verdict: Verdict, n: int) -> JudgedPair:
        replies = self.by_id[verdict.first], self.by_id[verdict.second]
        right: tuple[bool | None, bool | None] = ((True, False), (True, False), (True, True), (None, None))[n % 4]
        return JudgedPair(verdict, replies, (1.5, -0.25, 0.75, 0.0)[n % 4] + n / 64, n / 16, right)

    def _compared(self, question: Question, n: int) -> ComparedReplies:
        outcome = _OUTCOMES[n % len(_OUTCOMES)]
        before: bool | None = (False, True, None, False)[n % 4]
        after: bool | None = (True, True, None, False, None)[n % 5]
        return ComparedReplies(
            *(question.id, f"{question.id}-r0", f"After training: {n}.", outcome, None if outcome == "unparsable" else 0.5),
            *(n / 8, n / 4, before, after, 5 + n, 7, n % 3 != 2, True, n / 16),
        )

    # -- the report -----------------------------------------------------------------------------------------------------

    def report(self, name: str) -> Report:
        """Return the report of these records, by the functions that measure a real run."""
        rights = rights_of(self.judged)
        answered = [self._answered(row) for row in self.compared]
        return Report(
            schema=1,
            name=name,
            seed=0,
            model=Model(name="m", model_type="llama", parameters=1, precision="fp32", domain="sums", gold_file=None),
            data=self._data(),
            evaluator=measure_evaluator(
                self.judged, EvaluatorFacts(1.0, 0, 4, 2), measure_first_pairs(rights, None, has_gold=True), None, has_gold=True
            ),
            verdicts=measure_verdicts(self.verdicts, None, from_file=False),
            policy=measure_policy(answered, [Alarm(step=2, name="kl", message="KL rose.", action="warn")], None, has_gold=True),
            replies=measure_replies(
                48, self.replies, [a.finished_before for a in answered], [a.finished_after for a in answered]
            ),
            dropped=Dropped(questions=_counts(self.dropped_questions), verdicts=_counts(self.dropped_verdicts), examples=()),
            samples=tuple(sample_of(a, 0.0, 1.0) for a in answered[:2]),
            prompts={},
            time=Time(stages={"questions": 1.0}, per_verdict=None, total=1.0),
            memory=Memory(base_bytes=1, adapter_bytes=1, weight_copies=1.0, peak_bytes=1, events=()),
            versions={},
            config={},
        )

    def _data(self) -> Data:
        test = sum(q.split == Split.TEST for q in self.questions)
        held_out = sum(p.split == Split.TEST for p in self.pairs)
        return Data(
            seeds=len(self.seeds),
            questions=len(self.questions) - test,
            questions_test=test,
            replies=len(self.replies),
            pairs_train=len(self.pairs) - held_out,
            pairs_held_out=held_out,
        )

    def _answered(self, row: ComparedReplies) -> Answered:
        text = next(q.text for q in self.questions if q.id == row.question_id)
        outcome: Any = row.outcome
        return Answered(
            *(text, self.by_id[row.before].text, row.after, row.tokens_before, row.tokens_after),
            *(row.finished_before, row.finished_after, row.kl, outcome, row.gold_before, row.gold_after),
        )

    def write(self, folder: Path, *, shard: int = 10) -> Path:
        """Write the run folder and return it.

        Args:
            folder: the folder.
            shard: records per file of questions, replies and verdicts.
        """
        store = RunStore(folder)
        rows = {"questions": {"state": "finished", "seconds": 1.0}}
        config = RunConfig(name=folder.name).model_dump(mode="json")
        store.update_run(schema=RUN_SCHEMA, status="finished", name=folder.name, config=config, stages=rows)
        store.write_records("seeds.jsonl", self.seeds)
        drops = {"questions": self.dropped_questions, "verdicts": self.dropped_verdicts}
        for stage in ("questions", "replies", "reference_answers", "verdicts"):
            found: list[Any] = getattr(self, stage)
            for index, start in enumerate(range(0, len(found), shard)):
                dropped = drops.get(stage, []) if index == 0 else []
                store.write_shard(stage, index, found[start : start + shard], dropped if stage in drops else None)
        for split in Split:
            store.write_shard(f"pairs/{split.value}", 0, [p for p in self.pairs if p.split == split])
        for step in range(1, _STEPS + 1):
            store.write_shard("policy", step, [s for s in self.sampled if s.step == step])
            store.add_metrics("policy", {"step": step, "reward": step / 10, "kl": step / 20})
        store.folder("evaluation").mkdir()
        store.write_records("evaluation/scored.jsonl", self.scored)
        store.write_records("evaluation/compared.jsonl", self.compared)
        for stage in ("questions", "replies", "verdicts", "pairs", "policy", "evaluation"):
            store.finish(stage, "key", {}, outputs=[store.folder(stage)])
        store.write_json(folder / "report.json", self.report(folder.name).as_json())
        draw_page(folder)
        store.close()
        return folder


def make_view_run(folder: Path, questions: int = QUESTIONS, text: str = "") -> ViewRun:
    """Write a run and return its records."""
    run = ViewRun(questions, text)
    run.write(folder)
    return run


def _counts(drops: list[Drop]) -> dict[str, int]:
    reasons = sorted({drop.reason for drop in drops})
    return {reason: sum(drop.reason == reason for drop in drops) for reason in reasons}
