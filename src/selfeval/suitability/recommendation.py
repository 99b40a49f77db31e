"""The decision of a check: which judge to use, or why the model cannot judge this domain.

A judge can judge the domain if all of these hold:

1. The tests that apply show that it beats chance (`evaluation/judge_chance.py`), each with p <= 0.05 / number of judges checked
   (Bonferroni), so the probability that any judge of pure chance is recommended is at most 5%.
   With gold: its kept labels are right more often than not.
   Without gold: its orders agree (if it has orders), its answers depend on the question (if it holds a vote), its members agree
   (if it is combined), and its kept labels agree with the majority answer (if another judge holds a vote that passes its own
   test).
2. Without gold or a majority, it is not the rule "the longer reply": the interval of the share of kept verdicts that chose the
   longer reply is not entirely above 95%.

The model can be used if, in addition, the run would get enough questions, and its replies end:

3. The usable share of its questions is enough for a tenth of the questions of the run, below which a run stops.
4. Not most of its replies are cut off: the interval of that share is not entirely above one half.

Among several judges, the one with the most labels that are shown to be right is recommended:

    kept share * lower bound of (2 * share of right labels - 1)

with the share of the weakest of the tests instead of that of right labels, if these are not known.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfeval.config import RunConfig
from selfeval.evaluation.judge_probe import probe_sentences
from selfeval.quality.comparisons import FEWEST, LEVEL, Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.figures import percent
from selfeval.suitability.measures import JudgeMeasures, Measures

__all__ = ["Decision", "JudgeDecision", "decide", "run_command"]

LENGTH_RULE = 0.95
"""Share of choices of the longer reply above which a judge is a length rule."""
FEWEST_QUESTIONS = 0.1
"""Share of the questions of a run below which its stage questions stops."""


@dataclass(frozen=True)
class JudgeDecision:
    """Whether a judge can judge the domain.

    Attributes:
        name: name of the judge, and of its variant.
        can: whether it can.
        reasons: what shows that it can, or why it is not shown.
        remedies: findings of the probe with the settings that would help.
        score: see the module; 0 if it cannot.
    """

    name: str
    can: bool
    reasons: tuple[str, ...]
    remedies: tuple[str, ...]
    score: float = 0.0


@dataclass(frozen=True)
class Decision:
    """The recommendation.

    Attributes:
        judge: name of the recommended judge; None if a run is not recommended.
        assignments: values of `--set` that select it.
        reasons: why.
        remedies: what would help, if a run is not recommended.
        warnings: what to know although a run is recommended.
        judges: the decision on every judge.
    """

    judge: str | None
    assignments: tuple[str, ...]
    reasons: tuple[str, ...]
    remedies: tuple[str, ...]
    warnings: tuple[str, ...]
    judges: tuple[JudgeDecision, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "recommended": self.judge is not None,
            "judge": self.judge,
            "settings": list(self.assignments),
            "reasons": list(self.reasons),
            "remedies": list(self.remedies),
            "warnings": list(self.warnings),
            "judges": [
                {"name": j.name, "can": j.can, "reasons": list(j.reasons), "remedies": list(j.remedies)} for j in self.judges
            ],
        }


def decide(measures: Measures, config: RunConfig) -> Decision:
    """Apply the rule of the module.

    Args:
        measures: figures of the sample.
        config: configuration of the run.
    """
    level = LEVEL / max(len(measures.judges), 1)
    judges = tuple(_decide_judge(judge, level) for judge in measures.judges)
    blocks = [*_question_blocks(measures, config), *_reply_blocks(measures, config)]
    able = [judge for judge in judges if judge.can]
    warnings = _warnings(measures, config)
    if blocks or not able:
        # The remedies of judges matter only if a judge is missing.
        reasons = [reason for reason, _ in blocks] + ([] if able else [f"{j.name}: {'; '.join(j.reasons)}" for j in judges])
        remedies = [remedy for _, remedy in blocks] + ([] if able else _judge_remedies(judges))
        if not blocks and any(judge.probe.usable or not judge.probe.pairs for judge in measures.judges):
            remedies.append("more pairs may show it: raise --minutes")
        return Decision(None, (), tuple(reasons), tuple(dict.fromkeys(remedies)), tuple(warnings), judges)
    best = max(able, key=lambda judge: judge.score)
    chosen = next(judge for judge in measures.judges if judge.name == best.name)
    if chosen.gap_source is None:
        warnings.append(
            "nothing here shows that the labels are right: there is no gold and no majority answer. Pass answers for some "
            "questions (questions.file or gold_file), or read some verdicts"
        )
    return Decision(best.name, chosen.assignments, best.reasons, (), tuple(warnings), judges)


def run_command(decision: Decision, model: str | None, seeds: str | None, assignments: Sequence[str]) -> str:
    """Return the command of the recommended run.

    Args:
        decision: with a recommended judge.
        model, seeds: as given to the check.
        assignments: values of `--set` of the check.
    """
    sets = [part for value in (*assignments, *decision.assignments) for part in ("--set", value)]
    named = [part for option, value in (("--model", model), ("--seeds", seeds)) if value for part in (option, value)]
    return shlex.join(["selfeval", "run", *named, *sets])


# -- one judge ----------------------------------------------------------------------------------------------------------


def _decide_judge(judge: JudgeMeasures, level: float) -> JudgeDecision:
    tests = _tests(judge)
    failed = [_failure(name, test, level) for name, test in tests if not _beats_chance(test, level)]
    if not judge.probe.pairs:
        failed = ["it judged no pair: the time was over, or no question has two distinct replies"]
    elif judge.probe.unparsable == judge.probe.pairs:
        failed = [f"none of its {judge.probe.pairs} verdicts can be read"]
    elif not tests:
        failed.append("no test applies: there are no verdicts that could be compared")
    if not (judge.gold or judge.majority or judge.votes) and _is_length_rule(judge.lengths):
        failed.append(f"it follows the rule 'the longer reply' ({_share(judge.lengths)} of its kept verdicts)")
    remedies = tuple(probe_sentences(judge.probe))
    if failed:
        return JudgeDecision(judge.name, False, tuple(failed), remedies)
    weakest = judge.gold or judge.majority or min((test for _, test in tests), key=lambda test: test.difference.known)
    kept, low = judge.kept.known, weakest.difference.ci_low or 0.0
    passed = tuple(f"{name}: {_share(test)}, {_p(test)}" for name, test in tests)
    return JudgeDecision(judge.name, True, passed, remedies, kept * 2 * low)


def _tests(judge: JudgeMeasures) -> list[tuple[str, Comparison]]:
    """Return the tests that apply, by name."""
    if judge.gold is not None:
        return [("kept labels that are right by gold", judge.gold)]
    found = {
        "both orders agree": judge.orders,
        "replies with the majority answer of their question rather than of another one": judge.votes,
        "two of its judges choose the same reply": judge.members,
        "kept labels that agree with the majority answer": judge.majority,
    }
    return [(name, test) for name, test in found.items() if test is not None]


def _beats_chance(test: Comparison, level: float) -> bool:
    return test.finding == "better" and test.p_value is not None and test.p_value <= level


def _failure(name: str, test: Comparison, level: float) -> str:
    cases = test.wins + test.losses
    if test.difference.n < FEWEST or cases < FEWEST:
        return f"{name}: only {cases} informative pairs, at least {FEWEST} are needed"
    return f"{name}: {_share(test)}, not shown to beat chance ({_p(test)}; {level:.3g} is needed)"


def _share(test: Comparison) -> str:
    return f"{test.wins} of {test.wins + test.losses}"


def _p(test: Comparison) -> str:
    return "p not defined" if test.p_value is None else f"p = {test.p_value:.2g}"


def _is_length_rule(lengths: Comparison) -> bool:
    low = lengths.difference.ci_low
    return low is not None and 0.5 + low > LENGTH_RULE


def _judge_remedies(judges: Sequence[JudgeDecision]) -> list[str]:
    remedies = [f"{judge.name}: {remedy}" for judge in judges for remedy in judge.remedies]
    return [*remedies, "use a stronger model, or preference pairs of people (pairs.file)"]


# -- the model ----------------------------------------------------------------------------------------------------------


def _question_blocks(measures: Measures, config: RunConfig) -> list[tuple[str, str]]:
    usable = measures.questions.usable
    blocks = []
    if usable is not None and usable.known * config.questions.attempts < FEWEST_QUESTIONS:
        drops = ", ".join(f"{reason} {count}" for reason, count in measures.questions.drops.items())
        blocks.append(
            (
                f"it does not write usable questions: {_of(usable)} of its samples are usable (dropped: {drops})",
                "give more varied seeds, or your own questions (questions.file)",
            )
        )
    known = measures.questions.in_domain
    if known is not None and known.n >= FEWEST and known.ci_high is not None and known.ci_high < 0.5:
        blocks.append(
            (
                f"its questions are not in the domain: the oracle of {config.domain} knows {_of(known)} of them",
                "use a model that was trained on the domain, or your own questions (questions.file)",
            )
        )
    return blocks


def _reply_blocks(measures: Measures, config: RunConfig) -> list[tuple[str, str]]:
    cut = measures.replies.cut
    if cut.ci_low is None or cut.ci_low <= 0.5:
        return []
    loops = measures.replies.loops
    other = "use a model that ends its replies"
    more = f"raise {config.replies.limiting} (now {config.replies.longest}), or {other}"
    remedy = other if loops.known > 0.5 * cut.known else more
    return [(f"its replies do not end: {_of(cut)} are cut off, {_of(loops)} in a loop", remedy)]


def _warnings(measures: Measures, config: RunConfig) -> list[str]:
    found, usable, cut = [], measures.questions.usable, measures.replies.cut
    if usable is not None and FEWEST_QUESTIONS <= usable.known * config.questions.attempts < 1:
        share = usable.known * config.questions.attempts
        found.append(
            f"only {_of(usable)} of the samples of questions are usable: a run would stop at about {percent(share)} of its "
            "questions; raise questions.attempts"
        )
    if cut.value is not None and cut.value > 0.1 and not (cut.ci_low is not None and cut.ci_low > 0.5):
        found.append(f"{_of(cut)} of the replies are cut off; raise {config.replies.limiting} (now {config.replies.longest})")
    return found


def _of(figure: Figure) -> str:
    return f"{percent(figure.known)} (n {figure.n})"
