from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_models
from selfeval.backbone.adapters import BASE
from selfeval.config import RunConfig, VerdictsConfig
from selfeval.judging.judge import Comparison, Judgement
from selfeval.judging.templates import Templates, templates_folder
from selfeval.records import Question, Reply, Split, Verdict, VerdictState
from selfeval.rollout.engine import Request, Rollout, generate
from selfeval.stages import evaluation
from selfeval.stages import policy as policies
from selfeval.stages.context import Context
from selfeval.stages.evaluation import _TestPair
from selfeval.stages.policy import Sampled
from selfeval.stages.terminal import Terminal
from selfeval.store import RunStore, write_json
from selfeval.training.context import POLICY
from selfeval.training.evaluator import EVALUATOR

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
    return Verdict(
        question, split, f"{question}-r0", f"{question}-r1", state, probability=probability, words=("", ""), **values
    )


def pair(
    first: str, second: str, *, question: str = "q1", better: int = 0, margin: float = 1.0, said: Verdict | None = None
) -> _TestPair:
    replies = (reply(f"{question}-r0", first), reply(f"{question}-r1", second))
    return _TestPair(said or verdict(question), replies, better, margin, 0.0)


def judgement(in_order: float | None, swapped: float | None, tie: float | None = 0.0) -> Judgement:
    probability = None if in_order is None or swapped is None else (in_order + swapped) / 2
    return Judgement(probability, in_order, swapped, None if probability is None else tie, (tie, tie), ("", ""))


def context(folder: Path, **changes: Any) -> Context:
    return Context(RunConfig(**changes), RunStore(folder / "run"), Terminal(quiet=True))


# -- win, tie, loss -----------------------------------------------------------------------------------------------------

HALF = VerdictsConfig(tie=0.5)


@pytest.mark.parametrize(
    ("in_order", "swapped", "tie", "expected"),
    [
        pytest.param(0.9, 0.7, 0.1, 1.0, id="both orders prefer the policy's reply"),
        pytest.param(0.1, 0.4, 0.1, 0.0, id="both orders prefer the one before"),
        pytest.param(0.9, 0.8, 0.51, 0.5, id="both prefer the policy's, but the judge names a tie"),
        pytest.param(0.1, 0.2, 0.51, 0.5, id="both prefer the one before, but the judge names a tie"),
        pytest.param(0.9, 0.8, 0.5, 1.0, id="a tie that is not above the limit is none"),
        pytest.param(0.99, 0.4, 0.0, 0.5, id="the orders disagree, whatever their average"),
        pytest.param(0.01, 0.6, 0.0, 0.5, id="the orders disagree the other way"),
        pytest.param(0.5, 0.5, 0.0, 0.5, id="exactly half in both orders"),
        pytest.param(0.5, 0.9, 0.0, 0.5, id="exactly half in one order does not agree with the other"),
        pytest.param(None, 0.9, 0.0, None, id="one order did not parse"),
        pytest.param(0.9, None, 0.0, None, id="the other order did not parse"),
        pytest.param(None, None, 0.0, None, id="neither order parsed"),
    ],
)
def test_the_outcome_of_a_comparison(in_order: float | None, swapped: float | None, tie: float, expected: float | None) -> None:
    assert evaluation._outcome(judgement(in_order, swapped, tie), HALF) == expected


def test_the_limit_of_a_tie_is_the_configured_one() -> None:
    said = judgement(0.9, 0.8, 0.3)
    assert evaluation._outcome(said, VerdictsConfig(tie=0.29)) == 0.5
    assert evaluation._outcome(said, VerdictsConfig(tie=0.3)) == 1.0


# -- pairs that gold can tell apart -------------------------------------------------------------------------------------


def test_gold_says_which_reply_is_better_in_either_place() -> None:
    first, second = pair("1", "7", better=1), pair("7", "1", better=0)
    found = evaluation._by_gold([first, second], QUESTIONS, Gold())
    assert [p.better for p in found] == [0, 1]  # not what the judge preferred (1, 0)
    assert [p.replies for p in found] == [first.replies, second.replies]
    assert [p.margin for p in found] == [1.0, 1.0]
    assert [p.evaluator_right for p in found] == [True, False]  # it preferred the first reply both times


def test_pairs_that_gold_cannot_tell_apart_are_left_out() -> None:
    both_right, both_wrong = pair("1", "1"), pair("7", "8")
    without_gold = pair("a feeling", "a word", question="love")
    told = pair("2", "9", question="q2")
    found = evaluation._by_gold([both_right, both_wrong, without_gold, told], QUESTIONS, Gold())
    assert [p.verdict.question_id for p in found] == ["q2"]


@pytest.mark.parametrize("state", list(VerdictState))
@pytest.mark.parametrize("probability", [0.99, 0.5, 0.01, None])
def test_nothing_that_the_judge_said_decides_what_is_counted(state: VerdictState, probability: float | None) -> None:
    found = evaluation._by_gold([pair("1", "7", said=verdict("q1", probability, state))], QUESTIONS, Gold())
    assert [p.better for p in found] == [0]


@pytest.mark.parametrize(
    ("margin", "better", "right"),
    [(0.1, 0, True), (0.1, 1, False), (-0.1, 1, True), (-0.1, 0, False), (0.0, 0, False), (0.0, 1, False)],
)
def test_the_evaluator_is_right_when_it_scores_the_better_reply_higher(margin: float, better: int, right: bool) -> None:
    assert pair("a", "b", better=better, margin=margin).evaluator_right is right


def test_the_judged_test_pairs_are_all_of_the_test_split_with_their_margins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = context(tmp_path)
    replies = [reply(f"q{i}-r{n}", "x", ids=[9] * (2 * i + 3 * n + 1)) for i in range(5) for n in range(2)]
    verdicts = [
        verdict("q0", 0.9), verdict("q1", 0.2, UNSURE), verdict("q2", None, UNPARSABLE), verdict("q3", 0.0, TIE),
        verdict("q4", 0.9, split=Split.TRAIN),
    ]  # fmt: skip
    run.store.write_shard("replies", 0, replies)
    run.store.write_shard("verdicts", 0, verdicts)
    prompts: list[Sequence[int]] = []

    class Two:
        """Two evaluators: one says how long a reply is, the other twice that."""

        def each(self, asked: Sequence[Any], ids: Sequence[Any], advance: Any) -> torch.Tensor:
            prompts.extend(asked)
            return torch.tensor([[float(len(i)) for i in ids], [2.0 * len(i) for i in ids]])

    monkeypatch.setattr(evaluation, "scorer_of", lambda _: Two())
    monkeypatch.setattr(Context, "grade_prompt", lambda self, question_id, question: (question_id, question), raising=False)
    _give(run, "backbone", None)
    found = evaluation._judged_test_pairs(run, QUESTIONS)
    assert [p.verdict.question_id for p in found] == ["q0", "q1", "q2", "q3"]
    # Of question i, reply 0 has 2i + 1 tokens and reply 1 has 2i + 4: the margins are -3 and -6.
    assert [p.margin for p in found] == [-4.5] * 4
    assert [p.apart for p in found] == [1.5] * 4
    assert [p.better for p in found] == [0, 1, 0, 1]  # the judge's choice: 0.9, 0.2, none (the first), 0.0
    assert prompts == [(f"q{i}", f"What is {i}?") for i in (0, 1, 2, 3)] * 2  # what the evaluator was trained to read


def _give(run: Context, name: str, value: Any) -> None:
    """Puts something in the place of what a context would load."""
    vars(run)[name] = value


# -- the evaluator's figures --------------------------------------------------------------------------------------------


def _four_pairs() -> list[_TestPair]:
    def made(
        first: tuple[str, int, float], second: tuple[str, int, float], better: int, probability: float | None
    ) -> _TestPair:
        a, b = (reply(f"q1-r{n}", t, [7] * count, logprob) for n, (t, count, logprob) in enumerate((first, second)))
        return _TestPair(verdict("q1", probability, UNSURE), (a, b), better, 1.0, 0.0)

    return [
        made(("aaaa", 6, -3.0), ("bb", 1, -1.0), better=0, probability=None),
        made(("aaa", 2, -2.0), ("bbb", 4, -6.0), better=1, probability=0.0),
        made(("a", 1, -1.0), ("bbb", 2, -2.0), better=1, probability=0.5),
        made(("a", 1, -1.0), ("bbb", 1, -2.0), better=0, probability=0.9),
    ]


def test_the_baselines_by_hand() -> None:
    # pair (better)      1 (first)          2 (second)          3 (second)         4 (first)            mean
    # longer text        4 > 2      1       3 = 3        1/2    3 > 1       1      3 > 1        0       2.5 / 4 = 0.625
    # the first                     1                    0                  0                   1       2.0 / 4 = 0.5
    # log-prob a token   -.5 > -1   1       -1 > -1.5    0      -1 = -1     1/2    -1 > -2      1       2.5 / 4 = 0.625
    #   (a reply would   -3 < -1    0       -2 > -6      0      -1 > -2     0      -1 > -2      1       1.0 / 4)
    # judge              none       1/2     second (0)   1      half        1/2    first (.9)   1       3.0 / 4 = 0.75
    found = evaluation._baselines(_four_pairs())
    assert {name: figure.value for name, figure in found.items()} == {
        "longer_wins": 0.625, "first_wins": 0.5, "mean_logprob": 0.625, "judge": 0.75,
    }  # fmt: skip
    assert {figure.n for figure in found.values()} == {4}


def test_a_baseline_does_not_see_which_reply_is_better() -> None:
    # The same four pairs with the replies' roles exchanged: every right choice is wrong, and halves stay halves.
    turned = [_TestPair(p.verdict, p.replies, 1 - p.better, p.margin, 0.0) for p in _four_pairs()]
    assert {name: figure.value for name, figure in evaluation._baselines(turned).items()} == {
        "longer_wins": 0.375, "first_wins": 0.5, "mean_logprob": 0.375, "judge": 0.25,
    }  # fmt: skip


def test_no_pairs_have_no_baselines() -> None:
    assert [figure.as_json()["value"] for figure in evaluation._baselines([]).values()] == [None] * 4


UNITS = {"mean": 0.0, "deviation": 1.0}


def _evaluator_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[_TestPair], gold: Any, questions: dict[str, Question] = QUESTIONS
) -> dict[str, Any]:
    run = context(folder)
    run.store.finish("evaluator", "key", {"trained": 77})
    write_json(run.role_folder(EVALUATOR) / "evaluator.json", {**UNITS, "temperature": 2.0, "temperature_pairs": 60})
    monkeypatch.setattr(evaluation, "_judged_test_pairs", lambda *_: pairs)
    return evaluation._evaluator_figures(run, questions, gold, lambda count: None)


def test_the_evaluator_is_measured_on_gold_unfiltered_and_on_the_sure_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_ln_3 = 2 * math.log(3.0)  # at temperature 2 a confidence of 1 / (1 + 1/3) = 3/4
    pairs = [
        pair("1", "7", margin=two_ln_3, said=verdict("q1", 0.9)),  # gold: right; judge: right
        pair("7", "1", margin=two_ln_3, said=verdict("q1", 0.9)),  # gold: wrong; judge: right
        pair("1", "7", margin=two_ln_3, said=verdict("q1", None, UNPARSABLE)),  # gold: right
        pair("1", "7", margin=two_ln_3, said=verdict("q1", 0.6, UNSURE)),  # gold: right
        pair("1", "1", margin=-two_ln_3, said=verdict("q1", 0.9)),  # gold: cannot tell; judge: wrong
    ]
    found = _evaluator_figures(tmp_path, monkeypatch, pairs, Gold())
    assert (found["accuracy_gold"]["value"], found["accuracy_gold"]["n"]) == (0.75, 4)
    assert (found["accuracy_judge"]["value"], found["accuracy_judge"]["n"]) == (pytest.approx(2 / 3, abs=1e-6), 3)
    assert (found["baselines_on"], found["baselines"]["first_wins"]["n"]) == ("gold", 4)
    # Confidence 3/4 four times, right three times: (3 (1/4)^2 + (3/4)^2) / 4 = (3 + 9) / 64 = 0.1875.
    assert found["brier"]["value"] == pytest.approx(0.1875, abs=1e-6)
    # Right as often as claimed, in the one bin that four cases fill; one bin a case would call that an error of 0.375.
    assert (found["ece"]["value"], found["ece"]["ci_low"]) == (0.0, 0.0)
    assert found["ece"]["ci_high"] > 0.3
    assert (found["temperature"], found["temperature_pairs"]) == (2.0, 60)
    assert found["pairs_trained"] == 77
    assert found["risk_coverage"][-1] == [1.0, 0.25]


def test_without_gold_the_sure_judge_is_the_yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair("1", "7", margin=-1.0), pair("1", "7", said=verdict("q1", 0.6, UNSURE))]
    found = _evaluator_figures(tmp_path, monkeypatch, pairs, None)
    assert found["accuracy_gold"] is None
    assert (found["accuracy_judge"]["value"], found["accuracy_judge"]["n"]) == (0.0, 1)
    assert (found["baselines_on"], found["baselines"]["judge"]["n"]) == ("judge", 1)


def test_the_evaluator_is_compared_with_each_baseline_on_the_same_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of ten pairs, one of each question, the first reply is right in all, the evaluator in nine, the judge in one.
    pairs = [
        pair(
            str(i % 8),
            "99",
            question=f"q{i % 8}",
            margin=-1.0 if i == 9 else 1.0,
            said=verdict(f"q{i % 8}", 0.9 if i == 9 else 0.1),
        )
        for i in range(10)
    ]
    pairs = [dataclasses.replace(p, verdict=dataclasses.replace(p.verdict, question_id=f"q{i}")) for i, p in enumerate(pairs)]
    texts = {f"q{i}": Question(f"q{i}", f"What is {i % 8}?", Split.TEST, "self") for i in range(10)}
    found = _evaluator_figures(tmp_path, monkeypatch, pairs, Gold(), texts)["comparisons"]
    assert set(found) == {"judge", "longer_wins", "first_wins", "mean_logprob", "chance"}
    judge = found["judge"]
    assert (judge["wins"], judge["losses"], judge["test"], judge["finding"]) == (9, 1, "mcnemar_exact", "better")
    assert (judge["difference"]["value"], judge["difference"]["n"]) == (0.8, 10)
    assert judge["p_value"] == pytest.approx(2 * 11 / 2**10, abs=1e-6)  # C(10, 0) + C(10, 1) = 11
    assert (found["first_wins"]["wins"], found["first_wins"]["losses"]) == (0, 1)
    assert (found["chance"]["difference"]["value"], found["chance"]["test"]) == (0.4, "binomial_exact")
    # Replies of equal log-prob per token are half a credit each.
    assert (found["mean_logprob"]["wins"], found["mean_logprob"]["losses"], found["mean_logprob"]["test"]) == (
        9,
        1,
        "sign_exact",
    )


def test_pairs_of_one_question_are_one_case_of_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair("1", "7", said=verdict("q1", 0.1))] * 30
    found = _evaluator_figures(tmp_path, monkeypatch, pairs, Gold())["comparisons"]["judge"]
    assert (found["difference"]["n"], found["wins"], found["finding"]) == (1, 1, "too_few")


def test_on_its_own_labels_the_judge_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _evaluator_figures(tmp_path, monkeypatch, [pair("1", "7")], None)["comparisons"]
    assert found["judge"] is None
    assert found["chance"]["wins"] == 1


# -- the verdicts' figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "probability", "expected"),
    [
        pytest.param("1", "7", 0.9, True, id="chose the right one, shown first"),
        pytest.param("1", "7", 0.1, False, id="chose the wrong one, shown second"),
        pytest.param("7", "1", 0.1, True, id="chose the right one, shown second"),
        pytest.param("7", "1", 0.9, False, id="chose the wrong one, shown first"),
        pytest.param("1", "1", 0.9, False, id="both right: no right one over a wrong one"),
        pytest.param("7", "8", 0.1, False, id="both wrong"),
        pytest.param("1", "7", None, None, id="no verdict"),
    ],
)
def test_a_label_is_right_when_it_chose_a_right_reply_over_a_wrong_one(
    first: str, second: str, probability: float | None, expected: bool | None
) -> None:
    replies = {"q1-r0": reply("q1-r0", first), "q1-r1": reply("q1-r1", second)}
    assert evaluation._label_is_right(verdict("q1", probability), replies, QUESTIONS, Gold()) is expected


def test_a_label_of_a_question_without_gold_is_neither_right_nor_wrong() -> None:
    replies = {"love-r0": reply("love-r0", "a"), "love-r1": reply("love-r1", "b")}
    assert evaluation._label_is_right(verdict("love", 0.9), replies, QUESTIONS, Gold()) is None


def test_the_verdicts_figures_by_hand(tmp_path: Path) -> None:
    run = context(tmp_path)
    verdicts = [
        verdict("q0", 0.85, in_order=0.9, swapped=0.8),  # consistent; kept, chose the first: right
        verdict("q1", 0.10, in_order=0.1, swapped=0.1),  # consistent; kept, chose the second: wrong
        verdict("q2", 0.55, UNSURE, in_order=0.9, swapped=0.2),  # inconsistent
        verdict("q3", 0.45, UNSURE, in_order=0.2, swapped=0.7),  # inconsistent
        verdict("q4", 0.50, TIE, in_order=0.51, swapped=0.49, tie=0.8, ties=(0.8, 0.8)),  # consistent: neither, both times
        verdict("q5", None, UNPARSABLE, in_order=0.9, swapped=None, ties=(0.0, None)),  # not asked: one order did not parse
        verdict("q6", None, UNPARSABLE, in_order=None, swapped=None),
        verdict("q7", 0.75, UNSURE, in_order=0.9, swapped=0.6, tie=0.35, ties=(0.1, 0.6)),  # inconsistent: first, neither
        verdict("q8", 0.50, TIE, in_order=0.48, swapped=0.52, tie=0.9, ties=(0.9, 0.9)),  # consistent, as q4
        verdict("love", 0.95, in_order=0.9, swapped=1.0),  # consistent; kept, no gold
    ]
    names = [v.question_id for v in verdicts]
    replies = [reply(f"{n}-r0", n.removeprefix("q")) for n in names] + [reply(f"{n}-r1", "99") for n in names]
    run.store.write_shard("replies", 0, replies)
    run.store.write_shard("verdicts", 0, verdicts)
    found = evaluation._verdict_figures(run, QUESTIONS, Gold())
    counts = {name: found[name] for name in ("judged", "kept", "tie", "unsure", "unparsable")}
    assert counts == {"judged": 10, "kept": 3, "tie": 2, "unsure": 3, "unparsable": 2}
    assert (found["kept_share"]["value"], found["kept_share"]["n"]) == (3 / 10, 10)
    # Both orders parsed 8 times (q0 to q4, q7, q8, love) and agreed 5 times; on which side of 1/2 they lie agrees 4 times.
    assert (found["swap_consistency"]["value"], found["swap_consistency"]["n"]) == (5 / 8, 8)
    # Kept labels with gold: q0 right, q1 wrong.
    assert (found["label_accuracy_gold"]["value"], found["label_accuracy_gold"]["n"]) == (0.5, 2)
    assert evaluation._verdict_figures(run, QUESTIONS, None)["label_accuracy_gold"] is None


# -- gold shares --------------------------------------------------------------------------------------------------------


def test_the_gold_share_counts_only_questions_with_gold() -> None:
    answers = [("What is 1?", "1"), ("What is 2?", "2"), ("What is 3?", "4"), ("What is love?", "5")]
    found = evaluation._gold_share(Gold(), answers)
    assert found is not None
    # Wilson for 2 of 3, z = 1.959964: centre 2/3 + z^2/6 = 1.306910, half width z sqrt(2/27 + z^2/36) = 0.833345,
    # both over 1 + z^2/3 = 2.280486.
    assert found["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["ci_low"] == pytest.approx((1.306910 - 0.833345) / 2.280486, abs=1e-5)
    assert found["ci_high"] == pytest.approx((1.306910 + 0.833345) / 2.280486, abs=1e-5)
    assert found["n"] == 3
    assert evaluation._gold_share(None, answers) is None
    assert evaluation._gold_share(Gold(), [("What is love?", "5")]) == {"value": None, "ci_low": None, "ci_high": None, "n": 0}


def sampled(step: int, question: str, text: str, score: float = 0.0) -> Sampled:
    return Sampled(step, question, text, score, True)


def _stepped(run: Context, *steps: int) -> None:
    """These iterations count: the others were given up."""
    for step in steps:
        run.store.add_metrics("policy", {"step": step, "kl": 1.0})


def _curve(run: Context) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.store.metrics_path("evaluation").read_text().splitlines()]


def test_the_gold_curve_has_a_share_per_iteration_of_the_questions_with_gold(tmp_path: Path) -> None:
    run = context(tmp_path, evaluation={"gold_replies": 4})
    run.store.write_shard("policy", 2, [sampled(2, "q1", "1"), sampled(2, "q2", "2"), sampled(2, "love", "7")])
    run.store.write_shard("policy", 1, [sampled(1, "q1", "1"), sampled(1, "q2", "9"), sampled(1, "q3", "9")])
    run.store.write_shard("policy", 3, [sampled(3, "love", "7")])  # nothing that gold could tell
    # Of six only the first four with gold are checked: right, wrong, right, wrong.
    many = ["love", "q1", "q1", "q1", "q1", "q1", "q1"]
    run.store.write_shard("policy", 10, [sampled(10, q, t) for q, t in zip(many, "1171777", strict=True)])
    run.store.write_shard("policy", 11, [sampled(11, "q1", "1")])  # the policy went back from there and finished
    _stepped(run, 1, 2, 3, 10)
    evaluation._gold_curve(run, evaluation._checked_samples(run, QUESTIONS, Gold()))
    # All scores are the same, so that they promise what the first iteration gave: 1 of 3, with half a case added to each side.
    promised = pytest.approx(1.5 / 4, abs=1e-6)
    assert _curve(run) == [
        {"step": 1, "gold": pytest.approx(1 / 3, abs=1e-6), "expected": promised, "n": 3},
        {"step": 2, "gold": 1.0, "expected": promised, "n": 2},
        {"step": 10, "gold": 0.5, "expected": promised, "n": 4},
    ]


def test_what_the_evaluator_promises_beyond_gold_is_measured_over_the_distance(tmp_path: Path) -> None:
    run = context(tmp_path, evaluation={"gold_replies": 100})
    kls = [0.0, 0.25, 1.0, 2.25, 4.0, 6.25, 9.0, 12.25]
    for step, kl in enumerate(kls, start=1):
        run.store.add_metrics("policy", {"step": step, "kl": kl})
        # At first a score of 1 is right four times of five and one of -1 once of five; then all scores rise and gold does not.
        ones = 10 if step == 1 else 20
        scores = [1.0] * ones + [-1.0] * (20 - ones)
        right = [i % 5 != 0 for i in range(10)] + [i % 5 == 0 for i in range(10)]
        names = [f"q{i % 4}" for i in range(20)]
        rows = zip(names, scores, right, strict=True)
        run.store.write_shard("policy", step, [sampled(step, q, q[1] if good else "9", score) for q, score, good in rows])
    checked = evaluation._checked_samples(run, QUESTIONS, Gold())
    found = evaluation._overoptimisation(run, checked)
    assert found is not None
    assert found["start"] == [pytest.approx(0.5, abs=1e-6), 0.5]
    assert [point[0] for point in found["points"]] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])  # none at the start
    assert all(point[1] == pytest.approx(0.8, abs=0.01) and point[2] == 0.5 for point in found["points"])
    assert found["gap"]["value"] == pytest.approx(0.3, abs=0.01)
    assert found["gap"]["n"] == 4  # the last two of eight iterations have ten replies to each of four questions
    assert found["fit"]["gold"] == {"alpha": 0.0, "beta": 0.0, "rmse": 0.0}
    assert found["fit"]["evaluator"]["alpha"] > 0.1


def test_too_few_iterations_give_no_fit(tmp_path: Path) -> None:
    run = context(tmp_path)
    for step in (1, 2, 3):
        run.store.add_metrics("policy", {"step": step, "kl": float(step)})
        run.store.write_shard("policy", step, [sampled(step, "q1", "1")])
    assert evaluation._overoptimisation(run, evaluation._checked_samples(run, QUESTIONS, Gold())) is None
    assert evaluation._overoptimisation(run, {}) is None


def test_without_gold_there_is_no_curve(tmp_path: Path) -> None:
    run = context(tmp_path)
    run.store.write_shard("policy", 1, [sampled(1, "q1", "1")])
    evaluation._gold_curve(run, {})
    assert not run.store.metrics_path("evaluation").exists()


# -- the policy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Context, dict[str, Any]]:
    """A run with a policy whose replies and judge are scripted; `seen` tells what they were asked, and as whom."""
    run = context(tmp_path, evaluation={"questions": 3, "samples": 2}, batch_tokens=64)
    backbone = tiny_models.backbone("llama", 384)
    backbone.add_role(EVALUATOR, head=True)
    write_json(run.role_folder(EVALUATOR) / "evaluator.json", {"temperature": 1.0, "mean": 0.0, "deviation": 1.0})
    backbone.add_role(POLICY)
    _give(run, "backbone", backbone)
    _give(run, "templates", Templates.load(templates_folder("no such model"), backbone.loaded.tokenizer))
    train = Question("t", "What is 9?", Split.TRAIN, "self")
    run.store.write_shard("questions", 0, [train, *(QUESTIONS[f"q{i}"] for i in range(4))])
    before = [reply(f"q{i}-r{n}", f"before {i} {n}", ids=[7] * 8) for i in range(4) for n in range(2)]
    run.store.write_shard("replies", 0, [reply("t-r0", "x"), *before])
    seen: dict[str, Any] = {}

    def policy(backbone: Any, requests: Sequence[Request], **_: Any) -> list[Rollout]:
        seen.update({"policy acts": backbone.acting, "asked": [r.prompt for r in requests]})
        seen["sampled at"] = {(r.temperature, r.top_p) for r in requests}
        return [Rollout((*_spell(run, f"after {i}"), 1), (-1.0,), True) for i in range(len(requests))]

    def judge(backbone: Any, templates: Any, kind: str, comparisons: Sequence[Comparison], *_: Any, **__: Any) -> Any:
        seen.update({"judge acts": backbone.acting, "kind": kind, "comparisons": list(comparisons)})
        # For the policy's replies: sure of the first, torn between the orders on the second, not to be read on the third.
        opinions = [(0.9, 0.8), (0.7, 0.2), (None, None)]
        ours = [c.first.startswith("after") for c in comparisons]
        said = [
            o if is_first else tuple(None if p is None else 1 - p for p in o)
            for o, is_first in zip(opinions, ours, strict=True)
        ]
        return [judgement(*o) for o in said]

    def kl(run: Any, prompts: Sequence[Any], rollouts: Sequence[Rollout]) -> list[float]:
        return [0.25] * len(rollouts)

    monkeypatch.setattr(policies, "generate", policy)
    monkeypatch.setattr(evaluation, "compare", judge)
    monkeypatch.setattr(evaluation, "_kl_to_start", kl)
    return run, seen


def _spell(run: Context, text: str) -> list[int]:
    ids: list[int] = run.templates.tokenizer.encode(text, add_special_tokens=False)
    return ids


def test_the_referee_compares_the_policys_reply_with_the_first_one_before(answering: tuple[Context, dict[str, Any]]) -> None:
    run, seen = answering
    found = evaluation._answer_and_judge(run, None)
    asked = [QUESTIONS[f"q{i}"] for i in range(3)]  # test questions only, and as many as were configured
    assert [a.question for a in found] == asked
    assert seen["asked"] == [run.templates.prompt("reply", question=q.text) for q in asked]
    assert (seen["policy acts"], seen["judge acts"], seen["kind"]) == (POLICY, BASE, "referee")
    assert seen["sampled at"] == {(1.0, 1.0)}  # as the replies before were sampled
    assert seen["comparisons"] == [Comparison(q.text, f"after {i}", f"before {i} 0") for i, q in enumerate(asked)]
    assert [(a.after_text, a.before.text) for a in found] == [(f"after {i}", f"before {i} 0") for i in range(3)]


def test_a_preference_for_the_policys_reply_is_a_win(answering: tuple[Context, dict[str, Any]]) -> None:
    run, _ = answering
    figures, samples = evaluation._policy_figures(run, None, Gold(), lambda count: None)
    # Judgements in the policy's favour, torn between the orders, and unparsable: a win, a tie, and one that is not counted.
    assert {n: figures[n] for n in ("win", "tie", "loss", "unparsable")} == {"win": 1, "tie": 1, "loss": 0, "unparsable": 1}
    assert (figures["win_rate"]["value"], figures["win_rate"]["n"]) == (0.75, 2)  # (1 + 1/2) / 2
    assert (figures["win_rate_decisive"]["value"], figures["win_rate_decisive"]["n"]) == (1.0, 1)
    assert (figures["kl"]["value"], figures["kl"]["n"]) == (0.25, 3)
    # Lengths in tokens, after over before, of all three questions: before 8 each.
    lengths = [len(_spell(run, f"after {i}")) + 1 for i in range(3)]
    assert figures["length_ratio"]["value"] == pytest.approx(sum(lengths) / 24, abs=1e-6)
    verdicts = {"What is 0?": "win", "What is 1?": "tie", "What is 2?": "unparsable"}
    assert len(samples) == 2
    for sample in samples:
        number = sample["question"][8]
        assert (sample["after"], sample["before"]) == (f"after {number}", f"before {number} 0")
        assert sample["verdict"] == verdicts[sample["question"]]


def test_gold_before_and_after_are_not_exchanged(answering: tuple[Context, dict[str, Any]]) -> None:
    run, _ = answering

    class Likes(Gold):
        def is_right(self, question: str, reply: str) -> bool | None:
            return reply in ("after 0", "after 1", "before 2 0")

    figures, _ = evaluation._policy_figures(run, None, Likes(), lambda count: None)
    gold, wins = figures["comparisons"]["gold"], figures["comparisons"]["win_rate"]
    assert (gold["wins"], gold["losses"], gold["difference"]) == (2, 1, figures["gold_gain"])
    assert (wins["wins"], wins["losses"], wins["difference"]["value"], wins["difference"]["n"]) == (1, 0, 0.25, 2)
    assert {gold["finding"], wins["finding"]} == {"too_few"}
    assert figures["gold_after"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert figures["gold_before"]["value"] == pytest.approx(1 / 3, abs=1e-6)


# -- KL to the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_kl_is_the_policys_log_prob_minus_the_bases(family: str, batch_tokens: int, tmp_path: Path) -> None:
    run = context(tmp_path, batch_tokens=batch_tokens)
    backbone = tiny_models.backbone(family, eos=(1, 20, 21))
    backbone.add_role(POLICY)
    tiny_models.scramble(backbone, POLICY, size=0.1)
    _give(run, "backbone", backbone)
    prompts = [(5, 9, 2), (7,), (30, 31, 32, 33), (11, 12)] * 4
    with backbone.acting_as(POLICY):
        rollouts = generate(backbone, [Request(p) for p in prompts], max_new_tokens=9, seed=3)
    found = evaluation._kl_to_start(run, prompts, rollouts)
    expected = [
        _summed(backbone, POLICY, prompt, rollout.ids) - _summed(backbone, BASE, prompt, rollout.ids)
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-4)  # sums of up to nine fp32 log-probs, cached and plain passes
    assert min(found) < 0 < sum(found) / len(found)  # single samples may be below zero; their mean estimates a KL, which is not
    assert sum(found) / len(found) > 0.1


def _summed(backbone: Any, role: str, prompt: tuple[int, ...], ids: tuple[int, ...]) -> float:
    """One sequence, one plain pass."""
    with backbone.acting_as(role):
        full = tiny_models.full_logprobs(backbone.model, (*prompt, *ids))
    return sum(full[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids))


def test_a_policy_at_its_start_has_no_kl(tmp_path: Path) -> None:
    run = context(tmp_path)
    backbone = tiny_models.backbone("llama")
    backbone.add_role(POLICY)
    _give(run, "backbone", backbone)
    with backbone.acting_as(POLICY):
        rollouts = generate(backbone, [Request((5, 9, 2)), Request((7,))], max_new_tokens=6, seed=3)
    assert evaluation._kl_to_start(run, [(5, 9, 2), (7,)], rollouts) == pytest.approx([0.0, 0.0], abs=1e-5)
