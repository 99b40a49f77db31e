"""The figures of a judge on labelled pairs, from hand-made verdicts."""

from __future__ import annotations

import pytest

from selfeval.config import VerdictsConfig
from selfeval.judge_benchmark.figures import Case, Measured, choice_of, measure, share
from selfeval.judge_benchmark.judging import Outcome
from selfeval.judge_benchmark.pairs import Label, LabelledPair
from selfeval.judging.protocol import Judgement
from selfeval.quality.label_agreement import credit_of
from selfeval.records import PairwiseEvidence

CONFIG = VerdictsConfig(keep=0.8)


def case(
    probability: float | None,
    *labels: Label,
    question: str = "",
    texts: tuple[str, str] = ("long reply", "short"),
    orders: tuple[float, float] | None = None,
    tie: float = 0.0,
    logprobs: tuple[float | None, float | None] = (-1.0, -2.0),
    subset: str = "",
) -> Case:
    case.number += 1  # type: ignore[attr-defined]
    name = question or f"Q{case.number}"  # type: ignore[attr-defined]
    evidence = None if orders is None else PairwiseEvidence(*orders, (0.0, 0.0), ("", ""))
    verdict = Outcome(Judgement(probability, None if probability is None else tie, evidence)).verdict(CONFIG)
    return Case(LabelledPair(name, *texts, labels, subset), verdict, logprobs)


case.number = 0  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Six pairs with a preference and one tie: two right and kept, one wrong, one unsure and right, one tie, one unparsable."""
    return measure([
        case(0.9, "first", orders=(0.9, 0.9), subset="a"),
        case(0.1, "second", orders=(0.1, 0.1), subset="a"),
        case(0.9, "second", orders=(0.9, 0.9), subset="a"),
        case(0.6, "first", orders=(0.9, 0.3), subset="b"),
        case(0.5, "first", tie=0.9, subset="b"),
        case(None, "second", logprobs=(None, -1.0), subset="b"),
        case(0.5, "tie", tie=0.9),
    ])  # fmt: skip


def test_agreement_coverage_and_consistency(measured: Measured) -> None:
    scores = measured.scores
    assert (measured.pairs, measured.ties) == (7, 1)
    # Right, right, wrong, right, and two halves.
    assert scores.agreement.value == pytest.approx(4 / 6)
    assert (scores.coverage.value, scores.coverage.n) == (0.5, 6)
    assert (scores.agreement_kept.value, scores.agreement_kept.n) == (pytest.approx(2 / 3), 3)
    assert scores.unparsable.value == pytest.approx(1 / 6)
    assert (scores.swap_consistency.value, scores.swap_consistency.n) == (0.75, 4)


def test_baselines_are_credited_on_the_same_pairs(measured: Measured) -> None:
    # People prefer the first, which is the longer one and has the higher log-prob, in three of six pairs.
    assert {name: figure.value for name, figure in measured.baselines.items()} == {
        "longer": 0.5, "first": 0.5, "mean_logprob": pytest.approx(3.5 / 6),
    }  # fmt: skip
    # The judge is ahead of `first` on the second and the last pair, and behind on the tie.
    longer = measured.comparisons["first"]
    assert (longer.wins, longer.losses, longer.difference.value) == (2, 1, pytest.approx(1 / 6))
    assert measured.comparisons["chance"].difference.value == pytest.approx(1 / 6)
    assert measured.comparisons.keys() == {*measured.baselines, "chance"}


def test_subsets_and_ties(measured: Measured) -> None:
    assert {name: scores.agreement.value for name, scores in measured.subsets.items()} == {
        "a": pytest.approx(2 / 3), "b": pytest.approx(2 / 3),
    }  # fmt: skip
    assert measured.with_ties is not None
    # Equal labels: two kept right ones, the unsure one, and the tie.
    assert measured.with_ties.value == pytest.approx(4 / 7)
    assert measured.annotators is None


def test_agreement_at_coverage_takes_the_surest_pairs() -> None:
    cases = [case(0.5 + number / 20, "first" if number > 3 else "second") for number in range(1, 9)]
    found = measure(cases)
    assert [(coverage, figure.value, figure.n) for coverage, figure in found.at_coverage] == [
        (0.25, 1.0, 2), (0.5, 1.0, 4), (0.75, pytest.approx(5 / 6), 6), (1.0, 0.625, 8),
    ]  # fmt: skip
    assert found.aurc is not None
    # Risks of the k surest: 0 for five pairs, then 1/6, 2/7 and 3/8.
    assert found.aurc == pytest.approx((1 / 6 + 2 / 7 + 3 / 8) / 8)
    assert found.subsets == {}


def test_several_annotators() -> None:
    found = measure([case(0.9, "first", "first", "tie"), case(0.9, "second", "second", "second")])
    assert found.annotators is not None
    assert found.with_annotators is not None
    # Pairs of annotators: 1 of 3 and 3 of 3. The judge agrees with 2 of 3 and 0 of 3.
    assert found.annotators.value == pytest.approx(4 / 6)
    assert found.with_annotators.value == pytest.approx(2 / 6)


def test_pairs_of_one_question_are_one_cluster() -> None:
    values = [1.0, 1.0, 0.0, 0.0]
    plain, clustered = share(values, ["a", "b", "c", "d"]), share(values, ["a", "a", "b", "b"])
    assert plain.value == clustered.value == 0.5
    assert (plain.n, clustered.n) == (4, 2)
    found = measure([case(0.9, "first", question="Q"), case(0.9, "second", question="Q")])
    assert found.comparisons["first"].difference.n == 1


def test_choices_and_credits() -> None:
    assert choice_of(case(0.4, "first").verdict) == "second"
    assert choice_of(case(0.5, "first").verdict) == "tie"
    assert choice_of(case(0.9, "first", tie=0.7).verdict) == "tie"
    assert choice_of(case(None, "first").verdict) is None
    assert (credit_of(0.0, "first"), credit_of(-1.0, "second"), credit_of(1.0, "second")) == (0.5, 1.0, 0.0)


def test_everything_is_in_the_json(measured: Measured) -> None:
    values = measured.as_json()
    assert values["agreement"] == measured.scores.agreement.as_json()
    assert values["at_coverage"][0]["coverage"] == 0.25
    assert values["comparisons"]["longer"]["test"] == "sign_exact"
    assert values.keys() >= {"pairs", "ties", "subsets", "baselines", "with_ties", "annotators", "aurc"}
