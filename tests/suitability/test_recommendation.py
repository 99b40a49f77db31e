"""The rule of the recommendation, on figures that are built by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evidence_records import UNSURE, verdict
from selfeval.config import JUDGES, RunConfig, load_config
from selfeval.evaluation.judge_probe import diagnose
from selfeval.quality.comparisons import Comparison, compare_with_level
from selfeval.quality.statistics import Figure, proportion
from selfeval.suitability.candidates import candidates_of
from selfeval.suitability.measures import JudgeMeasures, Measures, QuestionMeasures, ReplyMeasures
from selfeval.suitability.recommendation import Decision, decide, run_command

CONFIG = RunConfig()


def score(wins: int, losses: int = 0) -> Comparison:
    return compare_with_level([1.0] * wins + [0.0] * losses)


def share(successes: int, n: int) -> Figure:
    return proportion([True] * successes + [False] * (n - successes))


def judge(name: str = "one", kept: Figure | None = None, **tests: Any) -> JudgeMeasures:
    none = dict.fromkeys(("retest", "gold", "majority", "gap", "gap_source", "orders", "votes"), None)
    found: dict[str, Any] = {**none, "lengths": score(10, 10), **tests}
    pairs = [verdict(in_order=0.95, swapped=0.05, state=UNSURE)] * 20
    probe = diagnose(pairs, CONFIG)
    return JudgeMeasures(
        name=name,
        assignments=(f"verdicts.judge={name}",),
        probe=probe,
        parsed=share(20, 20),
        kept=kept or share(10, 20),
        seconds_per_pair=1.0,
        **found,
    )


def decided(*judges: JudgeMeasures, config: RunConfig = CONFIG, **changes: Any) -> Decision:
    questions = QuestionMeasures(share(50, 60), {"too_short": 10}, None, 0, ())
    replies = ReplyMeasures(share(2, 100), share(0, 100), share(0, 50), None)
    questions = replace(questions, **{k: v for k, v in changes.items() if hasattr(questions, k)})
    replies = replace(replies, **{k: v for k, v in changes.items() if hasattr(replies, k)})
    return decide(Measures(questions, replies, judges), config)


def test_gold_decides_alone() -> None:
    assert decided(judge(gold=score(12), orders=score(1, 20))).judge == "one"
    found = decided(judge(gold=score(12, 8), orders=score(20)))
    assert found.judge is None
    assert "kept labels that are right by gold: 12 of 20, not shown to beat chance (p = 0.5" in found.reasons[0]


def test_too_few_cases_are_never_a_can() -> None:
    found = decided(judge(gold=score(5)))
    assert found.judge is None
    assert "only 5 informative pairs, at least 6 are needed" in found.reasons[0]
    assert decided(judge()).judge is None, "a judge without any test"


def test_a_judge_that_was_not_reached_is_undecided() -> None:
    found = decided(replace(judge(), probe=diagnose([], CONFIG), parsed=share(0, 0), kept=share(0, 0)))
    assert "it judged no pair: the time was over" in found.reasons[0]
    assert "more pairs may show it: raise --minutes" in found.remedies


def test_the_level_is_divided_by_the_number_of_judges() -> None:
    """6 of 6: p = 2 / 2^6 = 0.031, enough for one judge and not for two, of which one could succeed by luck."""
    assert decided(judge(gold=score(6))).judge == "one"
    assert decided(judge(gold=score(6)), judge("two", gold=score(3, 3))).judge is None


@pytest.mark.parametrize("failing", ["orders", "votes", "majority"])
def test_without_gold_every_test_that_applies_is_needed(failing: str) -> None:
    tests = dict.fromkeys(("orders", "votes", "majority"), score(12))
    assert decided(judge(gap_source="majority", **tests)).judge == "one"
    assert decided(judge(gap_source="majority", **{**tests, failing: score(10, 8)})).judge is None


def test_a_length_rule_is_no_judge() -> None:
    found = decided(judge(orders=score(80), lengths=score(80)))
    assert found.judge is None
    assert "it follows the rule 'the longer reply' (80 of 80" in found.reasons[0]
    # The right reply may be the longer one, and that is known here.
    assert decided(judge(gold=score(80), lengths=score(80))).judge == "one"


def test_consistency_alone_is_recommended_with_a_warning() -> None:
    found = decided(judge(orders=score(40)))
    assert found.judge == "one"
    assert any("nothing here shows that the labels are right" in warning for warning in found.warnings)


def test_the_judge_with_most_right_labels_is_recommended() -> None:
    few, many = judge("few", share(5, 50), gold=score(30)), judge("many", share(30, 50), gold=score(28, 2))
    assert decided(few, many).judge == "many"
    noisy = judge("noisy", share(40, 50), gold=score(26, 10))
    assert decided(many, noisy).judge == "many"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"usable": share(1, 64)}, "it does not write usable questions: 1.6% (n 64)"),
        ({"in_domain": share(0, 20)}, "its questions are not in the domain"),
        ({"cut": share(90, 100), "loops": share(80, 100)}, "its replies do not end: 90.0% (n 100) are cut off, 80.0% (n 100)"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_a_good_judge(changes: dict[str, Any], reason: str) -> None:
    found = decided(judge(gold=score(30)), **changes)
    assert found.judge is None
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith(reason)
    assert found.remedies


def test_questions_that_would_run_out_are_a_warning() -> None:
    found = decided(judge(gold=score(30)), usable=share(5, 100))
    assert found.judge == "one"
    assert "a run would stop at about 20.0% of its questions; raise questions.attempts" in found.warnings[0]


def test_the_findings_of_the_probe_are_the_remedies() -> None:
    found = decided(judge(orders=score(0, 20)))
    assert (
        "in 20 of 20 readable pairs, both orders chose the reply in the same position: use a stronger model"
        in found.remedies[0]
    )


def test_the_command_has_the_settings_of_the_check_and_of_the_judge() -> None:
    found = decided(judge(gold=score(12)))
    command = run_command(found, "my model", "seeds.txt", ["seed=3"])
    assert command == "selfeval run --model 'my model' --seeds seeds.txt --set seed=3 --set verdicts.judge=one"
    assert run_command(found, None, None, []) == "selfeval run --set verdicts.judge=one"


def test_the_candidates_have_the_votes_that_they_can_have() -> None:
    given = ["verdicts.votes=3"]
    found = {candidate.name: candidate for candidate in candidates_of(load_config(None, {}, given))}
    votes = {name: candidate.config.verdicts.votes for name, candidate in found.items()}
    assert votes == {"pairwise": 3, "pairwise, at once": 1, "pointwise": 3, "pointwise, at once": 1, "agreement": 1}
    for candidate in found.values():
        told = load_config(None, {}, [*given, *candidate.assignments]).verdicts
        assert (told.judge, told.votes) == (candidate.config.verdicts.judge, candidate.config.verdicts.votes)


def test_a_combined_judge_is_checked_if_it_is_configured_besides_its_members() -> None:
    config = load_config(None, {}, ["verdicts.judge=combined", "verdicts.combined.agreement.votes=4"])
    names = [candidate.name for candidate in candidates_of(config)]
    assert names == ["combined", "pairwise", "pairwise, at once", "pointwise", "pointwise, at once", "agreement"]


def test_the_candidates_are_those_of_the_registry() -> None:
    config = load_config(None, {}, ["verdicts.judge=agreement", "verdicts.agreement.votes=5", "verdicts.keep=0.7"])
    found = {candidate.name: candidate for candidate in candidates_of(config)}
    # A server is asked only if it is configured, and a combined judge would ask the others again.
    local = {name: spec for name, spec in JUDGES.items() if not spec.is_remote and not spec.combines}
    assert set(found) == set(local) | {f"{name}, at once" for name, spec in local.items() if spec.can_answer_at_once}
    assert next(iter(found)) == "agreement"
    assert found["agreement"].config.verdicts.settings.votes == 5  # type: ignore[union-attr]
    for candidate in found.values():
        # The settings that the recommendation prints select the same judge.
        told = load_config(None, {}, ["verdicts.keep=0.7", *candidate.assignments]).verdicts
        wanted = candidate.config.verdicts
        assert (told.judge, told.reasoning, told.keep) == (wanted.judge, wanted.reasoning, wanted.keep)
