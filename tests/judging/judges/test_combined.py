"""The combined judge: votes and their pool by hand, and a whole run with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from selfeval.cli.app import app
from selfeval.config import VerdictsConfig, load_config
from selfeval.errors import ConfigError
from selfeval.evaluation.judge_chance import members_against_chance
from selfeval.judging.judges.combined import pool_members, vote_of
from selfeval.judging.kinds import kinds_of_run
from selfeval.judging.protocol import Judgement, state_of
from selfeval.records import CombinedEvidence, PairwiseEvidence, Split, Unreadable, Verdict, VerdictState
from selfeval.runs.judge import Judge
from selfeval.runs.reader import RunReader
from toy import FEW, copy_lab, toy_arguments

CONFIG = VerdictsConfig(judge="combined", tie=0.6)
Member = tuple[float | None, float | None]
"""Probability and tie of a member."""


def evidence(*members: Member, config: VerdictsConfig = CONFIG) -> CombinedEvidence:
    votes = tuple(vote_of(Judgement(*member), config) for member in members)
    names = ("pairwise", "pointwise", "agreement")[: len(members)]
    probabilities, ties = zip(*members, strict=True)
    return CombinedEvidence(names, probabilities, ties, votes, (), (None,) * len(members))


def test_a_member_abstains_without_a_verdict_with_a_tie_and_at_one_half() -> None:
    assert evidence((0.51, 0.6), (0.0, None), (1.0, 0.0)).votes == (1, -1, 1)
    assert evidence((None, None), (0.9, 0.61), (0.5, 0.0)).votes == (0, 0, 0)


def test_votes_are_weighted_by_accuracy() -> None:
    # Odds 9, 1 / 3 and 3 / 2 for the first reply: 4.5.
    found = pool_members(evidence((0.6, 0.2), (0.1, 0.4), (0.99, None)), (0.9, 0.75, 0.6), CONFIG)
    assert found.probability == pytest.approx(4.5 / 5.5)
    assert found.tie == pytest.approx(0.3)
    assert isinstance(found.evidence, CombinedEvidence)
    assert found.evidence.accuracies == (0.9, 0.75, 0.6)
    # Without the second member, and with one that guesses.
    alone = pool_members(evidence((0.6, None), (None, None), (0.01, None)), (0.9, 0.75, 0.5), CONFIG)
    assert (alone.probability, alone.tie) == (pytest.approx(0.9), None)


def test_most_members_that_see_a_tie_make_one() -> None:
    found = pool_members(evidence((0.9, 0.1), (0.5, 0.95), (0.5, 1.0)), (0.9, 0.9, 0.9), CONFIG)
    assert state_of(found, CONFIG) == VerdictState.TIE


@pytest.mark.parametrize(
    ("members", "state"),
    [
        ([(None, None), (None, None), (0.5, 1.0)], VerdictState.UNPARSABLE),
        ([(None, None), (0.5, 0.9), (0.5, 1.0)], VerdictState.TIE),
        ([(0.5, 0.0), (0.5, 1.0), (0.5, 0.6)], VerdictState.UNSURE),
        ([(None, None), (0.5, 0.0)], VerdictState.UNPARSABLE),  # as frequent: the first member's
    ],
)
def test_without_a_vote_the_most_frequent_reason_counts(members: list[Member], state: VerdictState) -> None:
    assert state_of(pool_members(evidence(*members), (0.8,) * len(members), CONFIG), CONFIG) == state


def test_causes_and_outputs_are_those_of_all_members() -> None:
    one = PairwiseEvidence(None, 0.5, (None, 0.5), ("a", "b"), (Unreadable.CUT, None), (None, 0.75))
    found = CombinedEvidence(("pairwise", "pointwise"), (None, None), (None, None), (0, 0), (0.5, 0.5), (one, None))
    assert (found.causes, found.raw_output) == ((Unreadable.CUT, None), ("a", "b"))


def test_members_are_compared_with_chance() -> None:
    def verdict(*votes: int) -> Verdict:
        judges = ("pairwise", "pointwise", "agreement")
        found = CombinedEvidence(judges, (None,) * 3, (None,) * 3, votes, (0.7,) * 3, (None,) * 3)
        return Verdict("q", Split.TRAIN, "a", "b", VerdictState.KEPT, 0.9, 0.0, found)

    rows = [verdict(1, 0, 1)] * 11 + [verdict(0, -1, 1), verdict(-1, 0, 0), verdict(0, 0, 0)]
    found = members_against_chance(rows)
    assert (found.wins, found.losses) == (11, 1)
    assert found.difference.known == pytest.approx(11 / 12 - 0.5)


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        ('["pairwise"]', "must be two or more different judges of pairwise, pointwise, agreement"),
        ('["pairwise", "pairwise"]', "must be two or more different judges"),
        ('["pairwise", "endpoint"]', "unknown judge; did you mean"),
        ('["pairwise", "pointwse"]', 'did you mean "pointwise"?'),
    ],
)
def test_judges_that_cannot_be_combined_are_refused(judges: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, ["verdicts.judge=combined", f"verdicts.combined.judges={judges}"])
    assert said in str(caught.value)


def test_members_have_their_settings_and_templates() -> None:
    given = ["verdicts.judge=combined", "verdicts.votes=3", "verdicts.combined.agreement.answer=letter", "verdicts.keep=0.7"]
    config = load_config(None, {}, given).verdicts
    members = {member.judge: member for member in config.members}
    assert {name: member.votes for name, member in members.items()} == {"pairwise": 3, "pointwise": 3, "agreement": 1}
    assert members["agreement"].settings.answer == "letter"  # type: ignore[union-attr]
    assert {member.keep for member in config.members} == {0.7}
    assert set(kinds_of_run(config)) == {"ask", "grade", "reply", "judge", "pointwise", "referee"}
    two = load_config(None, {}, [*given[:1], 'verdicts.combined.judges=["pairwise", "agreement"]']).verdicts
    assert "pointwise" not in kinds_of_run(two)
    plain = VerdictsConfig()
    assert plain.members == (plain,)


# -- a run --------------------------------------------------------------------------------------------------------------

SETTINGS = (
    *("verdicts.judge=combined", "verdicts.combined.agreement.votes=8", "verdicts.max_new_tokens=64", "verdicts.keep=0.7"),
    *("replies.max_new_tokens=64", "verdicts.combined.pairs=36"),
)


@pytest.mark.slow
def test_a_run_is_labelled_by_three_judges_and_loads_them(tmp_path: Path) -> None:
    recipe = copy_lab(tmp_path / "lab")
    more = [part for setting in SETTINGS for part in ("--set", setting)]
    done = CliRunner().invoke(app, toy_arguments(recipe, tmp_path / "run", *more, sizes=FEW))
    assert done.exit_code == 0, done.output
    assert "verdicts: accuracies by the agreement of the judges: pairwise 0." in done.output
    reader = RunReader(tmp_path / "run")
    assert {type(verdict.evidence) for verdict in reader.records("verdicts")} == {CombinedEvidence}
    report: dict[str, Any] = json.loads((tmp_path / "run" / "report.json").read_text())
    accuracies = {member["judge"]: member["accuracy"] for member in report["verdicts"]["members"]}
    assert min(accuracies.values()) > 0.6  # all of them can judge this domain
    assert report["verdicts"]["label_accuracy_gold"]["value"] > 0.7
    page = (tmp_path / "run" / "index.html").read_text()
    assert "Judge agreement: accuracy of its votes, estimated from agreement" in page
    question = "Tom has 3 pens. He buys 2 more. How many pens does Tom have now?"
    found = Judge.load(tmp_path / "run").compare(question, "3 + 2 = 5. The answer is 5.", "3 + 2 = 6. The answer is 6.")
    assert found.preferred == "a"
    assert found.judgement is not None
    assert isinstance(found.judgement.evidence, CombinedEvidence)
    assert found.judgement.evidence.accuracies == tuple(accuracies.values())
