"""The diagnosis of a judge: figures by hand, and the setting that each finding names."""

from __future__ import annotations

import dataclasses
import re
from functools import reduce
from operator import getitem
from typing import Any

import pytest

from evidence_records import KEPT, TIE, UNPARSABLE, UNSURE, verdict, voted
from selfeval.config import RunConfig, load_config
from selfeval.evaluation.judge_probe import diagnose
from selfeval.records import Unreadable, Verdict, VerdictState
from selfeval.report.schema import JudgeProbe


def unread(*causes: Unreadable | None, masses: tuple[float | None, float | None] = (None, None)) -> Verdict:
    """An unparsable verdict: one cause for each order, None for an order that was read."""
    found = verdict("q1", None, UNPARSABLE)
    assert found.evidence is not None
    in_order, swapped = (0.9 if cause is None else None for cause in causes)
    ties = tuple(0.0 if cause is None else None for cause in causes)
    changed: Any = {"in_order": in_order, "swapped": swapped, "causes": causes, "label_masses": masses, "ties": ties}
    return dataclasses.replace(found, evidence=dataclasses.replace(found.evidence, **changed))


def biased(state: VerdictState = UNSURE) -> Verdict:
    """Both orders chose the reply shown first."""
    return verdict("q2", 0.5, state, in_order=0.95, swapped=0.05)


def diagnosed(verdicts: list[Verdict], *settings: str) -> JudgeProbe:
    return diagnose(verdicts, load_config(None, {}, settings))


def names(probe: JudgeProbe) -> list[str]:
    return [finding.name for finding in probe.findings]


def test_the_figures_of_a_probe_by_hand() -> None:
    pairs = [
        verdict("q0", 0.9),  # both orders chose the first reply, which the swapped order shows second
        biased(),
        verdict("q3", 0.5, TIE, ties=(0.9, 0.9)),  # `neither` is no choice of a position
        unread(None, Unreadable.CUT, masses=(0.75, None)),  # the first in order: shown first
        unread(Unreadable.LABEL_MASS, Unreadable.LOOP, masses=(0.25, None)),
    ]
    found = diagnosed(pairs)
    assert (found.pairs, found.kept, found.tie, found.unsure, found.unparsable) == (5, 1, 1, 1, 2)
    assert found.unreadable_orders.as_json() == {
        "cut": 1,
        "loop": 1,
        "label_mass": 1,
        "no_room": 0,
        "no_lead": 0,
        "no_answer": 0,
        "truncated": 0,
        "refused": 0,
    }
    # Read in both orders: q0, q2, q3; q0 and q3 agree.
    assert (found.agreement.value, found.agreement.n) == (2 / 3, 3)
    # q0: one of two; biased: two of two; half-read: one of one.
    assert (found.shown_first.value, found.shown_first.n) == (pytest.approx((0.5 + 1 + 1) / 3), 3)
    assert (found.label_mass.value, found.label_mass.n) == (0.5, 2)
    assert found.usable
    assert names(found) == []


@pytest.mark.parametrize(
    ("pairs", "usable", "expected"),
    [
        pytest.param([verdict()] * 16, True, [], id="a judge that works"),
        pytest.param([unread(Unreadable.CUT, Unreadable.CUT)] * 16, False, ["cut"], id="cut off"),
        pytest.param([unread(Unreadable.LOOP, Unreadable.CUT)] * 16, False, ["cut", "loop"], id="half of them loops"),
        pytest.param([unread(None, Unreadable.CUT)] * 16, False, ["cut"], id="one order is not enough"),
        pytest.param([biased(TIE)] * 16, False, ["position_bias"], id="position-biased ties"),
        pytest.param([biased()] * 8 + [unread(Unreadable.CUT, Unreadable.CUT)] * 8, False, ["cut", "position_bias"], id="both"),
        pytest.param([biased()] * 15 + [verdict()], True, ["position_bias"], id="one kept verdict is usable"),
        pytest.param([biased(VerdictState.KEPT)] * 16, True, ["position_bias"], id="kept, at keep = 0.5"),
        pytest.param([verdict("q", 0.7, UNSURE)] * 16, True, ["unsure"], id="consistent but not confident"),
        pytest.param([verdict("q", 0.5, TIE, ties=(0.9, 0.9))] * 16, True, ["ties"], id="ties in both orders"),
        pytest.param(
            [verdict("q", 0.5, TIE, ties=(0.9, 0.9))] * 11 + [verdict()] * 5, True, [], id="ties of a judge that works"
        ),
        pytest.param([unread(Unreadable.CUT, None)] * 7 + [verdict()] * 9, True, [], id="below a quarter of the orders"),
        pytest.param([unread(Unreadable.CUT, None)] * 8 + [verdict()] * 8, True, ["cut"], id="a quarter of the orders"),
    ],
)
def test_a_judge_is_unusable_only_if_nothing_can_come_out(pairs: list[Verdict], usable: bool, expected: list[str]) -> None:
    found = diagnosed(pairs)
    assert (found.usable, names(found)) == (usable, expected)


@pytest.mark.parametrize(
    ("pair", "settings", "named", "unnamed"),
    [
        (unread(Unreadable.CUT, Unreadable.CUT), ["verdicts.max_new_tokens=300"], "max_new_tokens, for example to 600", ""),
        (unread(Unreadable.LOOP, Unreadable.LOOP), [], "verdicts.reasoning = false", "raise verdicts.max_new_tokens"),
        (unread(Unreadable.LOOP, Unreadable.LOOP), ["verdicts.votes=2"], "false and verdicts.votes = 1", "raise"),
        (unread(Unreadable.NO_ROOM, Unreadable.NO_ROOM), [], "backbone.context.rope_scaling", ""),
        (
            unread(Unreadable.NO_ROOM, Unreadable.NO_ROOM),
            ["backbone.context.rope_scaling=yarn", "backbone.context.rope_factor=2"],
            "raise backbone.context.rope_factor",
            "rope_scaling",
        ),
        (unread(Unreadable.LABEL_MASS, Unreadable.LABEL_MASS, masses=(0.2, 0.4)), [], "label_mass (their mean is 0.3)", ""),
        (unread(Unreadable.NO_LEAD, Unreadable.NO_LEAD), [], "`lead`", ""),
        (biased(), ["verdicts.reasoning=false"], "verdicts.reasoning = true", ""),
        (biased(), ["verdicts.reasoning=true"], "stronger model", "reasoning"),
        (verdict("q", 0.7, UNSURE), [], "verdicts.keep", "reasoning"),
        (verdict("q", 0.5, TIE, ties=(0.9, 0.9)), ["verdicts.tie=0.6"], "verdicts.tie (now 0.6)", ""),
    ],
)  # fmt: skip
def test_a_remedy_names_a_setting_that_exists_and_is_not_set_already(
    pair: Verdict, settings: list[str], named: str, unnamed: str
) -> None:
    (finding,) = diagnosed([pair] * 16, *settings).findings
    assert named in finding.remedy
    assert not unnamed or unnamed not in finding.remedy
    values = RunConfig().model_dump()
    for setting in re.findall(r"\b(?:verdicts|backbone|replies)\.[\w.]*\w", finding.observation + finding.remedy):
        reduce(getitem, setting.split("."), values)


def unvoted(cause: Unreadable) -> Verdict:
    return voted(UNPARSABLE, None, None, share=None, causes=[cause] * 4)


@pytest.mark.parametrize(
    ("pair", "usable", "observed", "named"),
    [
        (unvoted(Unreadable.CUT), False, "64 of 64 votes were cut off", "to 512, or ask for shorter replies"),
        (unvoted(Unreadable.LOOP), False, "64 of 64 votes were cut off", "ask for shorter replies in reply.jinja"),
        (unvoted(Unreadable.NO_ROOM), False, "64 of 64 votes did not fit", "shorter questions"),
        (voted(KEPT, 0.9, causes=[Unreadable.NO_ANSWER]), True, "16 of 64 votes ended without an answer", "reply.jinja"),
        (voted(UNSURE, 0.5), True, "in 16 of 16 readable pairs, no answer has the majority", "agreement.share (now 0.5)"),
        (voted(UNSURE, 0.7), True, "16 of 16 readable pairs have less confidence than verdicts.keep = 0.8", "verdicts.keep"),
        (voted(TIE, 0.5, 1.0), True, "16 of 16 readable pairs are ties", "widen replies.temperature"),
    ],
)
def test_findings_on_a_vote(pair: Verdict, usable: bool, observed: str, named: str) -> None:
    found = diagnosed([pair] * 16, "verdicts.judge=agreement")
    (finding,) = found.findings
    assert observed in finding.observation
    assert named in finding.remedy
    said = finding.observation + finding.remedy
    assert not [word for word in ("reasoning", "order", "verdicts.tie", "replies.max_new_tokens") if word in said]
    assert (found.usable, found.agreement.n, found.shown_first.n, found.label_mass.n) == (usable, 0, 0, 0)


def test_some_votes_without_an_answer_are_no_finding() -> None:
    found = diagnosed([voted(KEPT, 0.9, causes=[Unreadable.CUT])] * 15 + [voted(KEPT, 0.9)], "verdicts.judge=agreement")
    assert found.unreadable_orders.cut == 15
    assert names(found) == []


def test_a_biased_judge_whose_orders_agree_beyond_the_bias_is_usable() -> None:
    # The position decides every order, and moves the probability of the better reply by little.
    first = verdict("q1", 0.5, UNSURE, in_order=0.99, swapped=0.05)
    second = verdict("q2", 0.5, UNSURE, in_order=0.95, swapped=0.01)
    agreeing = [first] * 8 + [second] * 8
    assert diagnosed(agreeing).usable
    assert names(diagnosed(agreeing)) == ["position_bias"]
    # Not calibrated, or no more often than by chance.
    assert not diagnosed(agreeing, "verdicts.calibration.method=off").usable
    contradicting = [verdict("q", 0.5, UNSURE, in_order=p, swapped=1 - p) for p in (0.95, 0.99) for _ in range(8)]
    assert not diagnosed(contradicting).usable
