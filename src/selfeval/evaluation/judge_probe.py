"""Diagnose a judge from its verdicts: what went wrong, how often, and the setting that would help.

A run probes its judge on the first pairs before it judges all of them, and stops early if nothing usable can come out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from selfeval.config import AgreementConfig, CombinedConfig, RunConfig, judge_spec
from selfeval.evaluation.verdicts import count_causes
from selfeval.judging.calibrated import looks_of
from selfeval.judging.choices import choices_of, is_consistent
from selfeval.judging.protocol import Judgement
from selfeval.quality.judge_calibration import unbiased_agreement
from selfeval.quality.selective_risk import binomial_tail
from selfeval.quality.statistics import mean_figure, proportion
from selfeval.records import (
    AgreementEvidence,
    CombinedEvidence,
    PairwiseEvidence,
    PointwiseEvidence,
    Unreadable,
    Verdict,
    VerdictState,
)
from selfeval.report.schema import JudgeProbe, ProbeFinding, UnreadableOrders

__all__ = ["PROBED", "diagnose", "probe_sentences", "shown_first"]

PROBED = 16
"""Pairs of the probe."""
COMMON = 0.25
"""Share of the orders (or votes) from which on a cause is a finding."""
_LEVEL = 0.05
"""Significance level of the agreement of both orders beyond the position bias."""
MOST = 0.75
"""Share of the readable pairs from which on ties or unsure pairs are a finding. On the embedded model, whose judge works, half
of the pairs are ties: both replies are right, or both wrong."""


def diagnose(verdicts: Sequence[Verdict], config: RunConfig) -> JudgeProbe:
    """Diagnose the judge.

    A pair is position-biased if both orders chose the reply in the same position. The judge is unusable if no verdict was kept,
    and every pair is unparsable or position-biased: more pairs of this kind teach an evaluator nothing. It is usable
    nevertheless if it is calibrated on consistency and its orders agree once the bias is subtracted (sign test, p <= 0.05).

    Args:
        verdicts: verdicts of the judge, in any state.
        config: settings of the run; a finding proposes only settings that are not set already.
    """
    states, causes = Counter(v.state for v in verdicts), count_causes(verdicts)
    consistent = [found for v in verdicts if (found := is_consistent(v)) is not None]
    hopeless = all(v.state == VerdictState.UNPARSABLE or is_position_biased(v) for v in verdicts)
    rescued = config.verdicts.fits_consistency and _agrees_beyond_bias(verdicts)
    return JudgeProbe(
        pairs=len(verdicts),
        kept=states[VerdictState.KEPT],
        tie=states[VerdictState.TIE],
        unsure=states[VerdictState.UNSURE],
        unparsable=states[VerdictState.UNPARSABLE],
        unreadable_orders=UnreadableOrders(**causes),
        agreement=proportion(consistent),
        shown_first=mean_figure([share for v in verdicts if (share := shown_first(v)) is not None]),
        label_mass=mean_figure([fmean(masses) for v in verdicts if (masses := _masses(v))]),
        usable=bool(states[VerdictState.KEPT]) or not hopeless or rescued,
        findings=(*_unreadable_findings(verdicts, config), *_choice_findings(verdicts, config)),
    )


def probe_sentences(probe: JudgeProbe) -> list[str]:
    """Return the findings as sentences, each with its remedy."""
    return [f"{finding.observation}: {finding.remedy}" for finding in probe.findings]


# -- figures of one pair ------------------------------------------------------------------------------------------------


def is_position_biased(verdict: Verdict) -> bool:
    """Return whether both orders chose the reply in the same position, so that their choices contradict each other."""
    return set(choices_of(verdict)) == {"first", "second"}


def _agrees_beyond_bias(verdicts: Sequence[Verdict]) -> bool:
    judged = [looks_of(Judgement(v.probability, v.tie, v.evidence)) for v in verdicts if v.state != VerdictState.TIE]
    pairs = [looks for looks in judged if looks is not None and len(looks.values) == 2]
    agreeing = math.floor(unbiased_agreement(pairs) * len(pairs))
    return bool(pairs) and binomial_tail(len(pairs) - agreeing, len(pairs), 0.5) <= _LEVEL


def is_split(verdict: Verdict) -> bool:
    """Return whether the judge held a vote and no answer has the majority: only then it is undecided without naming a tie."""
    return isinstance(verdict.evidence, AgreementEvidence) and verdict.probability == 0.5 and verdict.tie == 0


def shown_first(verdict: Verdict) -> float | None:
    """Return the share of the orders that chose the reply shown first, among those that chose one; None without any."""
    # `choices_of` names the replies of the pair; in the swapped order, its `second` is shown first.
    orders = zip(choices_of(verdict), ("first", "second"), strict=True)
    chosen = [choice == leading for choice, leading in orders if choice in ("first", "second")]
    return fmean(chosen) if chosen else None


def _masses(verdict: Verdict) -> list[float]:
    evidence = verdict.evidence
    members = evidence.members if isinstance(evidence, CombinedEvidence) else (evidence,)
    labelled = [member for member in members if isinstance(member, (PairwiseEvidence, PointwiseEvidence))]
    return [mass for member in labelled for mass in member.label_masses if mass is not None]


# -- outputs that cannot be read ----------------------------------------------------------------------------------------

_OBSERVED = {
    Unreadable.CUT: "were cut off at verdicts.max_new_tokens = {tokens} before a verdict",
    Unreadable.LOOP: "were cut off at verdicts.max_new_tokens = {tokens} while repeating a block of text",
    Unreadable.LABEL_MASS: "gave their verdict labels together less probability than verdicts.label_mass = {mass:g}",
    Unreadable.NO_ROOM: "did not fit the model's context",
    Unreadable.NO_LEAD: "ended without a verdict, and no lead could be appended",
    Unreadable.NO_ANSWER: "ended without an answer of the form {section}.answer = {answer}",
    Unreadable.TRUNCATED: "were cut off at verdicts.max_new_tokens = {tokens} and read after an appended lead",
    Unreadable.REFUSED: "refused to judge",
}


def _unreadable_findings(verdicts: Sequence[Verdict], config: RunConfig) -> list[ProbeFinding]:
    settings, counts = config.verdicts, count_causes(verdicts)
    # A pair has two orders, or as many votes as were sampled.
    total = sum(2 if v.evidence is None else len(v.evidence.causes) for v in verdicts)
    forms = [member.settings.answer for member in settings.members if isinstance(member.settings, AgreementConfig)]
    form = ", ".join(forms)
    section = "verdicts.combined.agreement" if isinstance(settings.settings, CombinedConfig) else "verdicts.agreement"
    said = {"tokens": settings.max_new_tokens, "mass": settings.label_mass, "answer": form, "section": section}
    outputs = judge_spec("judge", settings.judge).outputs
    masses = [mass for v in verdicts for mass in _masses(v) if mass < config.verdicts.label_mass]
    remedies = {
        Unreadable.CUT: _more_tokens(config),
        Unreadable.LOOP: _less_writing(config),
        Unreadable.LABEL_MASS: _lower_mass(masses),
        Unreadable.NO_ROOM: _more_room(config),
        Unreadable.NO_LEAD: _statements(config),
        Unreadable.NO_ANSWER: "set it to the form in which the model ends its replies, or ask for this form in reply.jinja",
        Unreadable.TRUNCATED: _more_tokens(config),
        Unreadable.REFUSED: "use judge templates that ask for a comparison only, or a model that refuses less",
    }
    return [
        _finding(cause.value, f"{counts[cause.value]} of {total} {outputs} {_OBSERVED[cause].format(**said)}", remedies[cause])
        for cause in Unreadable
        if counts[cause.value] >= COMMON * total and counts[cause.value]
    ]


def _can_answer_at_once(config: RunConfig) -> bool:
    return judge_spec("judge", config.verdicts.judge).can_answer_at_once


def _no_reasoning(config: RunConfig) -> str:
    # Several votes need a chain of thought.
    return "set verdicts.reasoning = false" + (" and verdicts.votes = 1" if config.verdicts.votes > 1 else "")


def _more_tokens(config: RunConfig) -> str:
    more = f"raise verdicts.max_new_tokens, for example to {2 * config.verdicts.max_new_tokens}"
    at_once = f", or {_no_reasoning(config)} to read the verdict at once"
    return more + at_once if _can_answer_at_once(config) else f"{more}, or ask for shorter replies in reply.jinja"


def _statements(config: RunConfig) -> str:
    if judge_spec("judge", config.verdicts.judge).is_remote:
        return "ask for the exact words of the verdict in judge.jinja, or use another model at the server"
    return "set `lead` for the judge in templates.toml"


def _less_writing(config: RunConfig) -> str:
    at_once = f"{_no_reasoning(config)}, to read the verdict at once"
    other = at_once if _can_answer_at_once(config) else "ask for shorter replies in reply.jinja"
    return f"more tokens would not help; {other}, or use a stronger model"


def _lower_mass(masses: Sequence[float]) -> str:
    seen = f" (their mean is {fmean(masses):.2g})" if masses else ""
    return f"use judge templates whose labels the model follows, or lower verdicts.label_mass{seen}"


def _more_room(config: RunConfig) -> str:
    shorter = f"lower {config.replies.limiting} (now {config.replies.longest})"
    if not _can_answer_at_once(config):
        shorter = "use shorter questions (questions.max_new_tokens), or lower verdicts.max_new_tokens"
    elif config.verdicts.reasoning:
        shorter += f" or verdicts.max_new_tokens, or {_no_reasoning(config)}"
    if config.backbone.context.rope_scaling == "none":
        return f"{shorter}, or extend the context with backbone.context.rope_scaling and backbone.context.rope_factor"
    return f"{shorter}, raise backbone.context.rope_factor, or use a model with a longer context"


# -- choices that cannot be used ----------------------------------------------------------------------------------------


def _choice_findings(verdicts: Sequence[Verdict], config: RunConfig) -> list[ProbeFinding]:
    read = [v for v in verdicts if v.state != VerdictState.UNPARSABLE]
    biased = [v for v in read if is_position_biased(v)]
    ties = [v for v in read if v.state == VerdictState.TIE and not is_position_biased(v)]
    split = [v for v in read if is_split(v)]
    unsure = [v for v in read if v.state == VerdictState.UNSURE and is_consistent(v) is not False and not is_split(v)]
    settings, of = config.verdicts, f"of {len(read)} readable pairs"
    found = []
    if len(biased) > len(read) / 2:
        seen = f"in {len(biased)} {of}, both orders chose the reply in the same position"
        found.append(_finding("position_bias", seen, _less_bias(config)))
    if ties and len(ties) >= MOST * len(read):
        seen = f"{len(ties)} {of} are ties"
        found.append(_finding("ties", seen, _fewer_ties(config, ties)))
    if len(split) > len(read) / 2:
        seen = f"in {len(split)} {of}, no answer has the majority of the votes"
        found.append(_finding("split", seen, _less_split(config)))
    if unsure and len(unsure) >= MOST * len(read):
        agree = ", although the orders agree" if any(is_consistent(v) for v in unsure) else ""
        seen = f"{len(unsure)} {of} have less confidence than verdicts.keep = {settings.keep:g}{agree}"
        found.append(_finding("unsure", seen, "lower verdicts.keep, which keeps noisier labels, or use a stronger model"))
    return found


def _less_bias(config: RunConfig) -> str:
    other = "use a stronger model (model), or custom judge templates"
    return other if config.verdicts.reasoning else f"set verdicts.reasoning = true, or {other}"


def _fewer_ties(config: RunConfig, ties: Sequence[Verdict]) -> str:
    wider = "widen replies.temperature, so that the replies differ"
    # A tie of a vote is certain, so no threshold changes it.
    can_raise = config.verdicts.tie < 1 and not all(v.tie == 1 for v in ties)
    return f"{wider}, or raise verdicts.tie (now {config.verdicts.tie:g})" if can_raise else wider


def _less_split(config: RunConfig) -> str:
    other = "lower verdicts.agreement.temperature, or use easier questions or a stronger model"
    settings = config.verdicts.settings
    if not isinstance(settings, AgreementConfig):
        return other
    return f"{other}; a lower verdicts.agreement.share (now {settings.share:g}) keeps noisier labels"


def _finding(name: str, observation: str, remedy: str) -> ProbeFinding:
    return ProbeFinding(name=name, observation=observation, remedy=remedy)
