"""The result of a run, in a few plain sentences and a small table.

Whatever is called better or worse was compared on the same cases: the evaluation stage measured the paired difference with its
interval and an exact test, and its finding is read here. Anything else is said to be not shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from selfeval.errors import InputError
from selfeval.report.figures import (
    NOT_MEASURED,
    Comparison,
    Figure,
    describe,
    describe_difference,
    duration,
    finite,
    number,
    points,
    read_comparison,
    read_figure,
    seconds,
    section,
    size,
    tested,
)
from selfeval.report.memory import memory_rows

__all__ = [
    "BASELINE_NAMES",
    "COSTS",
    "Badge",
    "Labels",
    "Standing",
    "badges",
    "baseline_labels",
    "cost_rows",
    "evaluator_accuracy",
    "rounds_of",
    "rounds_sentences",
    "strongest_baseline",
    "summary_rows",
    "verdict_sentences",
]

Standing = Literal["better", "worse", "unclear", "unmeasured"]
Labels = Literal["gold", "judge"]

BASELINE_NAMES = {
    "judge": "the prompted judge",
    "mean_logprob": "the mean log-probability",
    "longer_wins": "picking the longer reply",
    "first_wins": "picking the first reply",
}
RULES = ("mean_logprob", "longer_wins", "first_wins")
"""Baselines that need no judgement: an evaluator that is not better than each of them has learned nothing."""
COSTS = {"evaluator": "evaluator", "scoring": "evaluator, working known", "judge": "judge"}
"""Ways to reach a verdict whose time and tokens are measured."""
CLOSE = 0.02
"""An evaluator is close to its judge where the whole interval of the difference is above -2 points."""
OLDER = "no paired comparison is in this report, which an older version wrote"


@dataclass(frozen=True)
class Badge:
    """One word on a finding, and the class that colours it."""

    standing: Standing
    word: str


def verdict_sentences(report: dict[str, Any]) -> tuple[str, str]:
    """Say how good the evaluator is and what the policy gained, each with its interval and n.

    Nothing is softened: a policy that got worse is said to have got worse, a difference that the paired test does not show is
    not claimed, and without gold the sentence says that only a judge was asked.

    Args:
        report: the report of a run, schema 1.

    Returns:
        The sentences on the evaluator (its margin over simple rules, its difference from its judge, its cost), and the one on
        the policy.

    Raises:
        InputError: a figure in the report is not a figure.
    """
    return _evaluator_sentences(report), _policy_sentence(report)


def badges(report: dict[str, Any]) -> tuple[Badge, Badge]:
    """Return the same two verdicts as badges."""
    return _evaluator_badge(report), _policy_badge(report)


def evaluator_accuracy(report: dict[str, Any]) -> tuple[Figure, Labels] | None:
    """Return the evaluator's accuracy and the labels behind it: gold when there is gold, else the judge's."""
    by_gold = read_figure(report, "evaluator.accuracy_gold")
    if by_gold is not None:
        return by_gold, "gold"
    by_judge = read_figure(report, "evaluator.accuracy_judge")
    return None if by_judge is None else (by_judge, "judge")


def strongest_baseline(report: dict[str, Any]) -> tuple[str, Figure] | None:
    """Return the name and figure of the best baseline that was measured on the same labels as the evaluator.

    On the judge's own labels the judge is right by construction, so there it is not a baseline.
    """
    measured, labels = evaluator_accuracy(report), baseline_labels(report)
    if measured is None or measured[1] != labels:
        return None
    found = []
    for key, name in BASELINE_NAMES.items():
        figure = read_figure(report, f"evaluator.baselines.{key}")
        if figure is not None and (key != "judge" or labels == "gold"):
            found.append((name, figure))
    return max(found, key=lambda pair: pair[1].value, default=None)


def baseline_labels(report: dict[str, Any]) -> Labels:
    """Return whose labels the baselines were measured on.

    Raises:
        InputError: the report names labels that are neither gold nor the judge's.
    """
    named = section(report, "evaluator").get("baselines_on") or "judge"
    if named not in ("gold", "judge"):
        raise InputError(f'report.json: \'evaluator.baselines_on\' should be "gold" or "judge", got {named!r}')
    return "gold" if named == "gold" else "judge"


def _are_given(report: dict[str, Any]) -> bool:
    """Whether the labels of the pairs are those of a file of the user's, not a judge's."""
    return section(report, "verdicts").get("source") == "file"


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the terminal's table: what, and how much, with "not measured" where that is the truth."""
    given = "your file's" if _are_given(report) else "judge's"
    labels = "gold" if baseline_labels(report) == "gold" else given
    rows = [
        ("evaluator accuracy, gold labels", describe(read_figure(report, "evaluator.accuracy_gold"))),
        (f"evaluator accuracy, {given} labels", describe(read_figure(report, "evaluator.accuracy_judge"))),
    ]
    for key, name in BASELINE_NAMES.items():
        rows.append((f"  {name}, {labels} labels", describe(read_figure(report, f"evaluator.baselines.{key}"))))
    for key, name in BASELINE_NAMES.items():
        rows.append((f"evaluator less {name}", describe_difference(read_comparison(report, f"evaluator.comparisons.{key}"))))
    rows += cost_rows(report)
    rows += [
        ("win rate, after against before", describe(read_figure(report, "policy.win_rate"))),
        ("  less one half", describe_difference(read_comparison(report, "policy.comparisons.win_rate"))),
        ("gold before", describe(read_figure(report, "policy.gold_before"))),
        ("gold after", describe(read_figure(report, "policy.gold_after"))),
        ("  gold after less before", describe_difference(read_comparison(report, "policy.comparisons.gold"))),
        ("KL to the reference, nats per reply", describe(read_figure(report, "policy.kl"), as_percent=False)),
        ("reply length, after over before", describe(read_figure(report, "policy.length_ratio"), as_percent=False)),
    ]
    total = finite(section(report, "time").get("total"))
    peak = finite(section(report, "memory").get("peak_bytes"))
    rows.append(("time", NOT_MEASURED if total is None else duration(total)))
    rows.append(("peak memory", NOT_MEASURED if peak is None else size(peak)))
    return rows + memory_rows(report) + _round_rows(report)


def cost_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return seconds and tokens per verdict, by the evaluator and by the judge."""
    rows = []
    for who, name in COSTS.items():
        figure = read_figure(report, f"time.per_verdict.{who}")
        rows.append((f"time per verdict, {name}", NOT_MEASURED if figure is None else _timed(figure)))
    for who, name in COSTS.items():
        tokens = _tokens(report, who)
        told = NOT_MEASURED if tokens is None else f"{number(tokens[0])} read, {number(tokens[1])} written"
        rows.append((f"tokens per verdict, {name}", told))
    return rows


def _timed(figure: Figure) -> str:
    if figure.ci_low is None or figure.ci_high is None:
        return f"{seconds(figure.value)} (no interval, n = {figure.n})"
    return f"{seconds(figure.value)} (interval {seconds(figure.ci_low)} to {seconds(figure.ci_high)}, n = {figure.n})"


def _tokens(report: dict[str, Any], who: str) -> tuple[float, float] | None:
    """Tokens read and written per verdict."""
    read, written = (read_figure(report, f"evaluator.cost.{who}.tokens_{how}") for how in ("read", "written"))
    return None if read is None or written is None else (read.value, written.value)


def _round_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Of each later round: the evaluator on the pairs of round 1, and the policy against the one before."""
    found = []
    for row in rounds_of(report)[1:]:
        labels = "gold" if read_figure(row, "evaluator.accuracy_gold_first_pairs") else "judge"
        name = f"round {row['round']}"
        accuracy = read_figure(row, f"evaluator.accuracy_{labels}_first_pairs")
        found.append((f"{name}: evaluator on round 1's pairs", describe(accuracy)))
        found.append((f"{name}: win rate against the round before", describe(read_figure(row, "policy.win_rate"))))
        found.append((f"{name}: gold after", describe(read_figure(row, "policy.gold_after"))))
    return found


def rounds_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the rounds, first to last; none for a run of one round.

    Raises:
        InputError: they are no list of objects, or are not numbered 1, 2, ...
    """
    rows = report.get("rounds") or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("report.json: 'rounds' should be a list of objects")
    if [row.get("round") for row in rows] != list(range(1, len(rows) + 1)):
        raise InputError(f"report.json: 'rounds' should be numbered from 1, got {[row.get('round') for row in rows]}")
    return rows


def rounds_sentences(report: dict[str, Any]) -> tuple[str, ...]:
    """Say up to which round evaluator and policy still got better, and what the next one showed; nothing for one round.

    An evaluator is compared with that of the round before on the same pairs, those of round 1; a policy with the one before on
    the same questions, by gold, or by the judge without gold.

    Raises:
        InputError: a row is not one of a round.
    """
    rows = rounds_of(report)
    if len(rows) < 2:
        return ()
    whose = "gold" if read_figure(rows[0], "evaluator.accuracy_gold_first_pairs") is not None else "the judge"
    steps = [(row["round"], read_comparison(row, "evaluator.comparison")) for row in rows[1:]]
    told = "the share of pairs it is right on, less that of the round before, is"
    return _progress(f"By {whose}, on round 1's pairs, the evaluator", steps, told), _policy_progress(rows)


def _policy_progress(rows: list[dict[str, Any]]) -> str:
    by_gold = [(row["round"], read_comparison(row, "policy.comparisons.gold")) for row in rows]
    if all(comparison is not None for _, comparison in by_gold):
        return _progress("By gold, the policy", by_gold, "the share of right replies, less that of the policy before, is")
    by_judge = [(row["round"], read_comparison(row, "policy.comparisons.win_rate")) for row in rows]
    return _progress("By the judge, the policy", by_judge, "the win rate over the policy before, less one half, is")


def _progress(who: str, steps: list[tuple[int, Comparison | None]], told: str) -> str:
    """One sentence on the comparisons of the rounds."""
    measured = [(number, comparison) for number, comparison in steps if comparison is not None]
    if len(measured) < len(steps):
        return f"{who} was not compared with the one before in every round."
    reached = next((i for i, (_, step) in enumerate(measured) if step.finding != "better"), len(measured))
    number, comparison = measured[min(reached, len(measured) - 1)]
    shown = describe_difference(comparison)
    if reached == len(measured):
        return f"{who} got better in every round: in the last, round {number}, {told} {shown}."
    start = f"got better up to round {number - 1} and stops there" if reached else "did not get better"
    how = {"worse": "is worse", "too_few": "has too few cases to show a gain"}.get(comparison.finding, "shows no gain")
    again = " and ".join(str(later) for later, step in measured[reached:] if step.finding == "better")
    rest = f"; it got better again in round {again}" if again else ""
    return f"{who} {start}: round {number} {how}, {told} {shown}{rest}."


def _evaluator_sentences(report: dict[str, Any]) -> str:
    measured = evaluator_accuracy(report)
    if measured is None:
        return "The evaluator was not measured."
    accuracy, labels = measured
    if labels == "gold":
        told = describe(accuracy, of=" of held-out pairs")
        start = f"By gold, the evaluator picks the better reply in {told}"
    elif _are_given(report):
        told = describe(accuracy, of=" of the held-out pairs of your file")
        start = f"By your own labels, the evaluator picks the better reply in {told}"
    else:
        told = describe(accuracy, of=" of the held-out pairs that the judge was sure of")
        start = f"With no gold to check against, only agreement is known: the evaluator picks the judge's choice in {told}"
    if not _is_compared(report):
        return f"{start}; {OLDER}."
    sentences = [f"{start}, {_against_rules(report)}.", _against_judge(report), _cost_sentence(report)]
    return " ".join(sentence for sentence in sentences if sentence)


def _is_compared(report: dict[str, Any]) -> bool:
    return _labels_match(report) and read_comparison(report, "evaluator.comparisons.chance") is not None


def _labels_match(report: dict[str, Any]) -> bool:
    """Whether the baselines were measured on the labels by which the evaluator's accuracy is told."""
    measured = evaluator_accuracy(report)
    return measured is not None and measured[1] == baseline_labels(report)


def _rules(report: dict[str, Any]) -> list[tuple[str, Comparison]]:
    """The comparisons with the simple rules, the one with the smallest margin first."""
    found = {name: read_comparison(report, f"evaluator.comparisons.{name}") for name in RULES}
    known = [(BASELINE_NAMES[name], comparison) for name, comparison in found.items() if comparison is not None]
    return sorted(known, key=lambda rule: rule[1].difference.value)


def _hardest(report: dict[str, Any]) -> tuple[str, Comparison] | None:
    """The level or rule that the evaluator is not better than, the worst finding first; None where it is better than all."""
    chance = read_comparison(report, "evaluator.comparisons.chance")
    found = [*([("tossing a coin", chance)] if chance else []), *_rules(report)]
    for finding in ("worse", "too_few", "unclear"):
        hit = next((rule for rule in found if rule[1].finding == finding), None)
        if hit:
            return hit
    return None


def _against_rules(report: dict[str, Any]) -> str:
    hardest, rules = _hardest(report), _rules(report)
    if hardest is None:
        if not rules:
            return "and no simple rule was compared on the same pairs"
        name, comparison = rules[0]
        return f"above every simple rule on the same pairs; above the strongest, {name}, by {describe_difference(comparison)}"
    name, comparison = hardest
    if comparison.finding == "worse":
        return f"which is worse than {name}, by {describe_difference(comparison, turned=True)}"
    if comparison.finding == "too_few":
        return "too few to claim anything"
    return f"which is not shown to be better than {name}: the difference is {_describe_unclear(comparison)}"


def _against_judge(report: dict[str, Any]) -> str:
    comparison = read_comparison(report, "evaluator.comparisons.judge")
    if comparison is None:
        return ""
    if comparison.finding == "better":
        return f"It is better than its judge, by {describe_difference(comparison)}."
    if comparison.finding == "worse":
        return f"It is worse than its judge, by {describe_difference(comparison, turned=True)}."
    if comparison.finding == "too_few":
        return f"The pairs are too few to compare it with its judge ({tested(comparison)}, n = {comparison.difference.n})."
    return f"No difference from its judge is shown: {_describe_unclear(comparison)}."


def _describe_unclear(comparison: Comparison) -> str:
    """Describe a difference that is not claimed; explain it where the interval and the test disagree."""
    told, (low, high) = describe_difference(comparison), (comparison.difference.ci_low, comparison.difference.ci_high)
    if comparison.finding != "unclear" or low is None or high is None or low <= 0 <= high:
        return told
    return f"{told}; the interval excludes 0, but the exact test is not significant, and both are required"


def _cost_sentence(report: dict[str, Any]) -> str:
    """Time and tokens per verdict against the judge's, and whether the evaluator replaces it."""
    costs = {who: _cost(report, who) for who in COSTS}
    ours, judge = costs["evaluator"], read_figure(report, "time.per_verdict.judge")
    if ours is None or judge is None:
        return "The cost of a verdict was not measured."
    judges = _tokens(report, "judge")
    instead = f" (the judge reads and writes {number(sum(judges))})" if judges else ""
    told = f"A verdict takes its judge {seconds(judge.value)}, and the evaluator {ours.told}{instead}"
    scoring = costs["scoring"]
    if scoring is not None and scoring.time.value < ours.time.value:
        told += f"; where its working of the question is known, {scoring.told}"
    return f"{told}.{_success(report)}"


@dataclass(frozen=True)
class _Cost:
    """A way to reach a verdict: its time, the judge's time over it, and both with the tokens in words."""

    time: Figure
    ratio: Figure
    told: str

    @property
    def is_faster(self) -> bool:
        """Whether the whole interval of the ratio is above 1."""
        return self.ratio.ci_low is not None and self.ratio.ci_low > 1


def _cost(report: dict[str, Any], who: str) -> _Cost | None:
    time, ratio = (read_figure(report, f"time.per_verdict.{name}") for name in (who, f"judge_over_{who}"))
    if time is None or ratio is None or ratio.value <= 0:
        return None
    speed = f"{_times_word(ratio.value)} faster" if ratio.value >= 1 else f"{_times_word(1 / ratio.value)} slower"
    tokens = _tokens(report, who)
    return _Cost(time, ratio, f"{seconds(time.value)}, {speed}" + (f", with {number(sum(tokens))} tokens" if tokens else ""))


def _times_word(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _speed(report: dict[str, Any]) -> str | None:
    """How much faster than its judge the evaluator answers; None where that is not shown."""
    for who, where in (("evaluator", ""), ("scoring", " where its working is known")):
        cost = _cost(report, who)
        if cost is not None and cost.is_faster:
            return f"{_times_word(cost.ratio.value)} faster{where}"
    return None


def _is_close(comparison: Comparison) -> bool:
    low = comparison.difference.ci_low
    return comparison.finding != "too_few" and low is not None and low > -CLOSE


def _success(report: dict[str, Any]) -> str:
    comparison, speed = read_comparison(report, "evaluator.comparisons.judge"), _speed(report)
    if comparison is None or _hardest(report) is not None or speed is None or not _is_close(comparison):
        return ""
    if comparison.finding != "worse":
        return f" As a distilled evaluator it is a success: {speed}, and at most {points(CLOSE)} worse than its judge."
    loss = points(-comparison.difference.value)
    return f" As a distilled evaluator it is a success: it loses {loss} and answers {speed}."


def _evaluator_badge(report: dict[str, Any]) -> Badge:
    if not _is_compared(report):
        return Badge("unmeasured", NOT_MEASURED if evaluator_accuracy(report) is None else "not compared")
    hardest = _hardest(report)
    if hardest is not None:
        return _obstacle_badge(*hardest)
    judge = read_comparison(report, "evaluator.comparisons.judge")
    if judge is None or judge.finding in ("unclear", "too_few"):
        return Badge("better", "▲ better than simple rules")
    if judge.finding == "better":
        return Badge("better", "▲ better than its judge")
    speed = _speed(report)
    if speed is not None and _is_close(judge):
        return Badge("better", f"▲ {points(-judge.difference.value)} below its judge, {speed}")
    return Badge("worse", "▼ worse than its judge")


def _obstacle_badge(name: str, comparison: Comparison) -> Badge:
    if comparison.finding == "worse":
        return Badge("worse", f"▼ worse than {name}")
    return Badge("unclear", "◇ too few pairs" if comparison.finding == "too_few" else f"◇ not shown to beat {name}")


def _policy_comparison(report: dict[str, Any]) -> tuple[Comparison | None, Labels]:
    """The policy against its start: by gold where both were measured, else by the judge."""
    if _gold_shares(report) is not None:
        return read_comparison(report, "policy.comparisons.gold"), "gold"
    return read_comparison(report, "policy.comparisons.win_rate"), "judge"


def _gold_shares(report: dict[str, Any]) -> tuple[Figure, Figure] | None:
    before, after = read_figure(report, "policy.gold_before"), read_figure(report, "policy.gold_after")
    return None if before is None or after is None else (before, after)


def _policy_badge(report: dict[str, Any]) -> Badge:
    comparison, labels = _policy_comparison(report)
    if comparison is None:
        measured = labels == "gold" or read_figure(report, "policy.win_rate") is not None
        return Badge("unmeasured", "not compared" if measured else NOT_MEASURED)
    words: dict[str, Badge] = {
        "better": Badge("better", "▲ better"),
        "worse": Badge("worse", "▼ worse"),
        "too_few": Badge("unclear", "◇ too few questions"),
    }
    return words.get(comparison.finding, Badge("unclear", "◇ not shown"))


def _policy_sentence(report: dict[str, Any]) -> str:
    shares, wins = _gold_shares(report), read_figure(report, "policy.win_rate")
    comparison, _ = _policy_comparison(report)
    if shares is not None:
        older = "" if comparison else f"; {OLDER}"
        return f"{_gold_clause(*shares, comparison)}{_win_clause(report, wins, comparison)}{older}."
    if wins is None:
        return "The gain of the policy was not measured."
    start = "With no gold to check against, only the judge can be asked"
    told = f"{describe(wins)}, a tie counting half"
    if comparison is None:
        return f"{start}: the win rate of the new policy's replies is {told}; {OLDER}."
    test = f"less one half: {describe_difference(comparison)}"
    return {
        "better": f"{start}: it prefers the new policy's replies, with a win rate of {told} ({test}).",
        "worse": f"{start}: it finds that the policy got worse, with a win rate of {told} ({test}).",
        "too_few": f"{start}: the comparisons are too few to claim anything, with a win rate of {told} ({test}).",
    }.get(comparison.finding, f"{start}: it shows no gain, with a win rate of {told} ({test}).")


def _gold_clause(before: Figure, after: Figure, comparison: Comparison | None) -> str:
    told = f"from {describe(before)} to {describe(after)}"
    if comparison is None:
        return f"Replies that are right by gold went {told}"
    if comparison.finding == "better":
        return f"The policy got better: replies that are right by gold rose {told}, by {describe_difference(comparison)}"
    if comparison.finding == "worse":
        fell = describe_difference(comparison, turned=True)
        return f"The policy got worse: replies that are right by gold fell {told}, by {fell}"
    start = "Too few questions to show a gain" if comparison.finding == "too_few" else "No gain is shown"
    return f"{start}: replies that are right by gold went {told}, a difference of {_describe_unclear(comparison)}"


def _win_clause(report: dict[str, Any], wins: Figure | None, by_gold: Comparison | None) -> str:
    by_judge = read_comparison(report, "policy.comparisons.win_rate")
    if wins is None:
        return "; the win rate was not measured"
    told = f"with a win rate of {describe(wins)}"
    if by_judge is None:
        return f", {told}"
    told = f"{told.removesuffix(')')}, {tested(by_judge)})"
    if by_judge.finding in ("unclear", "too_few"):
        return f"; the judge sees no clear change, {told}"
    side = "new" if by_judge.finding == "better" else "old"
    gold = by_gold.finding if by_gold else "unclear"
    if gold == by_judge.finding:
        return f", and the judge prefers the {side} ones too, {told}"
    if gold == "worse":
        return f", yet the judge prefers the {side} ones, {told}: they please the judge without being right"
    return f", yet the judge prefers the {side} ones, {told}"
