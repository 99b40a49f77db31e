"""What the run was worth, in two plain sentences and a small table.

Two figures are called different only when their intervals do not overlap; anything else is said to be not shown.
That is stricter than a paired test and never claims too much.
"""

from __future__ import annotations

from typing import Any, Literal

from selfeval.errors import InputError
from selfeval.report.figures import (
    NOT_MEASURED,
    Figure,
    describe,
    duration,
    finite,
    read_figure,
    section,
    size,
)
from selfeval.report.memory import memory_rows

__all__ = [
    "BASELINE_NAMES",
    "Labels",
    "Standing",
    "baseline_labels",
    "evaluator_accuracy",
    "rounds_of",
    "rounds_sentences",
    "standings",
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
CHANCE = 0.5


def verdict_sentences(report: dict[str, Any]) -> tuple[str, str]:
    """Say what the evaluator is worth and what the policy gained, each with its interval and n.

    Nothing is softened: a policy that got worse is said to have got worse, an interval that includes no change is said
    to show no gain, and without gold the sentence says that only a judge was asked.

    Args:
        report: the report of a run, schema 1.

    Returns:
        One sentence on the evaluator, one on the policy.

    Raises:
        InputError: a figure in the report is not a figure.
    """
    return _evaluator_sentence(report), _policy_sentence(report)


def standings(report: dict[str, Any]) -> tuple[Standing, Standing]:
    """Return the same two verdicts as words: the evaluator against its baselines, the policy against its start."""
    measured = evaluator_accuracy(report)
    if measured is None:
        return "unmeasured", _policy_standing(report)
    accuracy, against = measured[0], strongest_baseline(report)
    standing = _compare(accuracy, CHANCE)
    if standing == "better" and against is not None:
        standing = _compare(accuracy, against[1])
    return standing, _policy_standing(report)


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


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the terminal's table: what, and how much, with "not measured" where that is the truth."""
    labels = "gold" if baseline_labels(report) == "gold" else "judge's"
    rows = [
        ("evaluator accuracy, gold labels", describe(read_figure(report, "evaluator.accuracy_gold"))),
        ("evaluator accuracy, judge's labels", describe(read_figure(report, "evaluator.accuracy_judge"))),
    ]
    for key, name in BASELINE_NAMES.items():
        rows.append((f"  {name}, {labels} labels", describe(read_figure(report, f"evaluator.baselines.{key}"))))
    rows += [
        ("win rate, after against before", describe(read_figure(report, "policy.win_rate"))),
        ("gold before", describe(read_figure(report, "policy.gold_before"))),
        ("gold after", describe(read_figure(report, "policy.gold_after"))),
        ("KL to the reference, nats per reply", describe(read_figure(report, "policy.kl"), as_percent=False)),
        ("reply length, after over before", describe(read_figure(report, "policy.length_ratio"), as_percent=False)),
    ]
    seconds = finite(section(report, "time").get("total"))
    peak = finite(section(report, "memory").get("peak_bytes"))
    rows.append(("time", NOT_MEASURED if seconds is None else duration(seconds)))
    rows.append(("peak memory", NOT_MEASURED if peak is None else size(peak)))
    return rows + memory_rows(report) + _round_rows(report)


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
    the same questions, by gold, or by the judge without gold. Better: the whole interval of the difference is above no change.

    Raises:
        InputError: a row is not one of a round.
    """
    rows = rounds_of(report)
    if len(rows) < 2:
        return ()
    gains = [read_figure(row, "evaluator.gain") for row in rows[1:]]
    evaluator = [(row["round"], gain, 0.0) for row, gain in zip(rows[1:], gains, strict=True)]
    told = "the share of pairs it is right on, less that of the round before, is"
    whose = "gold" if read_figure(rows[0], "evaluator.accuracy_gold_first_pairs") is not None else "the judge"
    return _progress(f"By {whose}, on round 1's pairs, the evaluator", evaluator, told), _policy_progress(rows)


def _policy_progress(rows: list[dict[str, Any]]) -> str:
    by_gold = [(row["round"], read_figure(row, "policy.gold_gain"), 0.0) for row in rows]
    if all(figure is not None for _, figure, _ in by_gold):
        return _progress("By gold, the policy", by_gold, "the share of right replies, less that of the policy before, is")
    by_judge = [(row["round"], read_figure(row, "policy.win_rate"), CHANCE) for row in rows]
    return _progress("By the judge, the policy", by_judge, "the win rate over the policy before is")


def _progress(who: str, steps: list[tuple[int, Figure | None, float]], told: str) -> str:
    """One sentence on the figures of the rounds, each compared with the level that means no change."""
    measured = [(number, figure, _compare(figure, level)) for number, figure, level in steps if figure is not None]
    if len(measured) < len(steps):
        return f"{who} was not measured in every round."
    reached = next((i for i, (_, _, standing) in enumerate(measured) if standing != "better"), len(measured))
    number, figure, standing = measured[min(reached, len(measured) - 1)]
    if reached == len(measured):
        return f"{who} got better in every round: in the last, round {number}, {told} {describe(figure)}."
    start = f"got better up to round {number - 1} and stops there" if reached else "did not get better"
    shown = "is worse" if standing == "worse" else "shows no gain"
    again = " and ".join(str(later) for later, _, how in measured[reached:] if how == "better")
    rest = f"; it got better again in round {again}" if again else ""
    return f"{who} {start}: round {number} {shown}, {told} {describe(figure)}{rest}."


def _compare(figure: Figure, other: Figure | float) -> Standing:
    if figure.above(other):
        return "better"
    return "worse" if figure.below(other) else "unclear"


def _evaluator_sentence(report: dict[str, Any]) -> str:
    measured = evaluator_accuracy(report)
    if measured is None:
        return "What the evaluator is worth was not measured."
    accuracy, labels = measured
    if labels == "gold":
        told = describe(accuracy, of=" of held-out pairs")
        start = f"By gold, the evaluator picks the better reply in {told}"
    else:
        told = describe(accuracy, of=" of the held-out pairs that the judge was sure of")
        start = f"With no gold to check against, only agreement is known: the evaluator picks the judge's choice in {told}"
    return f"{start}, {_against_baselines(report, accuracy)}."


def _against_baselines(report: dict[str, Any], accuracy: Figure) -> str:
    chance = _compare(accuracy, CHANCE)
    if chance == "worse":
        return "which is worse than tossing a coin"
    if chance == "unclear":
        return "which is not shown to be better than tossing a coin"
    strongest = strongest_baseline(report)
    if strongest is None:
        return "and no baseline was measured on the same labels"
    name, figure = strongest
    told = f"its strongest baseline, {name}, at {describe(figure)}"
    if accuracy.above(figure):
        return f"above {told}"
    if accuracy.below(figure):
        return f"which is worse than {told}"
    return f"which is not shown to be better than {told}: the intervals overlap"


def _policy_standing(report: dict[str, Any]) -> Standing:
    before, after = read_figure(report, "policy.gold_before"), read_figure(report, "policy.gold_after")
    if before is not None and after is not None:
        return _compare(after, before)
    wins = read_figure(report, "policy.win_rate")
    return "unmeasured" if wins is None else _compare(wins, CHANCE)


def _policy_sentence(report: dict[str, Any]) -> str:
    before, after = read_figure(report, "policy.gold_before"), read_figure(report, "policy.gold_after")
    wins = read_figure(report, "policy.win_rate")
    if before is not None and after is not None:
        return f"{_gold_clause(before, after)}{_win_clause(wins, _compare(after, before))}."
    if wins is None:
        return "What the policy gained was not measured."
    told = f"{describe(wins)}, a tie counting half"
    start = "With no gold to check against, only the judge can be asked: it"
    return {
        "better": f"{start} prefers the new policy's replies, with a win rate of {told}.",
        "worse": f"{start} finds that the policy got worse, with a win rate of {told}.",
    }.get(_compare(wins, CHANCE), f"{start} shows no gain, with a win rate of {told}: the interval includes no change.")


def _gold_clause(before: Figure, after: Figure) -> str:
    told = f"from {describe(before)} to {describe(after)}"
    standing = _compare(after, before)
    if standing == "better":
        return f"The policy got better: replies that are right by gold rose {told}"
    if standing == "worse":
        return f"The policy got worse: replies that are right by gold fell {told}"
    return f"No gain is shown: replies that are right by gold went {told}, and the intervals overlap"


def _win_clause(wins: Figure | None, by_gold: Standing) -> str:
    if wins is None:
        return "; the win rate was not measured"
    by_judge = _compare(wins, CHANCE)
    told = f"with a win rate of {describe(wins)}"
    if by_judge == "unclear":
        return f"; the judge sees no clear change, {told}"
    side = "new" if by_judge == "better" else "old"
    if by_gold == by_judge:
        return f", and the judge prefers the {side} ones too, {told}"
    if by_gold == "worse":
        return f", yet the judge prefers the {side} ones, {told}: they please the judge without being right"
    return f", yet the judge prefers the {side} ones, {told}"
