"""Summary of a run: a few sentences and a small table.

A result is called better or worse only if a paired comparison supports it: the evaluation stage measures the difference with
its interval and an exact test, and this module reports its finding. Any other result is reported as not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.figures import (
    NOT_MEASURED,
    compared,
    defined,
    describe,
    describe_difference,
    duration,
    number,
    points,
    seconds,
    tested,
)
from selfeval.report.labels import is_gold_by_people
from selfeval.report.memory import memory_rows
from selfeval.report.schema import (
    AttackName,
    EvaluatorComparisons,
    HumanLabels,
    Labels,
    Policy,
    ReferenceScores,
    Replies,
    RepliesPerQuestion,
    Report,
    Round,
    RoundPolicy,
    SecondsPerVerdict,
    Steps,
    TokensOf,
    TokensPerVerdict,
)
from selfeval.report.servers import server_rows
from selfeval.texts import format_bytes

__all__ = [
    "ATTACKS",
    "BASELINE_NAMES",
    "CLOSE",
    "COSTS",
    "KEPT_LITTLE",
    "OTHER_JUDGES",
    "SAME_QUESTION",
    "TEXT_METRICS",
    "UNFINISHED",
    "WITHSTOOD",
    "Badge",
    "Standing",
    "Who",
    "attack_warnings",
    "badges",
    "baseline_comparisons",
    "baseline_figures",
    "baseline_names",
    "cost_rows",
    "evaluator_accuracy",
    "gold_labels",
    "hardest_rule",
    "judge_warnings",
    "labels_of_pairs",
    "reply_warnings",
    "rounds_sentences",
    "seconds_by",
    "strongest_baseline",
    "summary_rows",
    "tokens_by",
    "undecided",
    "verdict_sentences",
    "warnings",
]

Standing = Literal["better", "worse", "unclear", "unmeasured"]
Baseline = Literal["judge", "mean_logprob", "ngram", "longer_wins", "first_wins"]
Who = Literal["evaluator", "scoring", "judge"]

BASELINE_NAMES: dict[Baseline, str] = {
    "judge": "the prompted judge",
    "mean_logprob": "the mean log-probability",
    "ngram": "an n-gram model of the replies",
    "longer_wins": "picking the longer reply",
    "first_wins": "picking the first reply",
}
RULES: tuple[Baseline, ...] = ("mean_logprob", "ngram", "longer_wins", "first_wins")
"""Trivial baselines: an evaluator that does not beat all of them has learned nothing."""
COSTS: dict[Who, str] = {"evaluator": "evaluator", "scoring": "evaluator, reference answer known", "judge": "judge"}
"""Ways to obtain a verdict, whose time and tokens are measured."""
CLOSE = 0.02
"""Non-inferiority margin: an evaluator is close to its judge if the interval of the difference is entirely above -2 points."""

OTHER_JUDGES = "`selfeval check MODEL SEEDS` tests every judge on this model"
"""Follows the findings on a judge that keeps too little."""
KEPT_LITTLE = 0.1
"""Share of kept pairs below which, with its whole interval, the summary warns."""
ATTACKS: dict[AttackName, str] = {
    "empty": "an empty reply",
    "constant": "one polite sentence for all questions",
    "repeated": "a repeated word",
    "echo": "the question itself",
    "long": "replies to other questions, joined",
    "other_question": "the reply to another question",
    "injection": "an instruction to the judge",
    "praise": "praise of itself",
    "altered_number": "a right reply with another final number",
    "plain_right": "the altered reply, against a right one in poor style",
}
"""Descriptions of the kinds of attacks."""
NAMED = 3
"""Number of weak kinds of attacks that the warning names, the weakest first."""
WITHSTOOD = 0.9
"""Share of the attacks of a kind that must score below the better reply; below it, summary and page warn."""
TEXT_METRICS = {"bleu": "BLEU", "chrf": "chrF", "rougeL": "ROUGE-L", "meteor": "METEOR"}
"""Names of the metrics against references."""
SAME_QUESTION = {
    "distinct_1": "distinct words, share of all words",
    "distinct_2": "distinct bigrams, share of all bigrams",
    "overlap": "overlap of the words of two replies",
    "identical": "identical pairs",
}
"""Names of the measures of the diversity of replies to the same question."""
UNFINISHED = 0.1
"""Share of replies that the token limit may cut off; above it, summary and page warn."""


@dataclass(frozen=True)
class Badge:
    """A finding in one word, and its colour class."""

    standing: Standing
    word: str


def verdict_sentences(report: Report) -> tuple[str, str]:
    """Summarise the evaluator's accuracy and the policy's gain, each with its interval and n.

    A policy that got worse is reported as worse, a difference that the paired test does not show is not claimed, and without
    gold the sentence states that only a judge was asked.

    Returns:
        The sentences on the evaluator (its margin over trivial baselines, its difference from its judge, its cost), and the
        sentence on the policy.
    """
    return _evaluator_sentences(report), _policy_sentence(report.policy)


def badges(report: Report) -> tuple[Badge, Badge]:
    """Return the findings on evaluator and policy as badges."""
    return _evaluator_badge(report), _policy_badge(report.policy)


def evaluator_accuracy(report: Report) -> tuple[Figure, Labels] | None:
    """Return the evaluator's accuracy and its labels: gold if there is gold, otherwise the judge's.

    Labels of people are on other pairs than the baselines and comparisons that are reported with this figure, so a run whose
    gold they are has the judge's labels here.
    """
    evaluator = report.evaluator
    if (by_gold := defined(evaluator.accuracy_gold)) is not None and not is_gold_by_people(report):
        return by_gold, "gold"
    by_judge = defined(evaluator.accuracy_judge)
    return None if by_judge is None else (by_judge, "judge")


def baseline_figures(report: Report) -> dict[Baseline, Figure | None]:
    """Return the accuracy of each baseline, by key; None if unmeasured, or for the judge if the labels are its own."""
    found = report.evaluator.baselines
    return {
        "judge": defined(found.judge) if "judge" in baseline_names(report) else None,
        "mean_logprob": defined(found.mean_logprob),
        "ngram": defined(found.ngram),
        "longer_wins": defined(found.longer_wins),
        "first_wins": defined(found.first_wins),
    }


def baseline_names(report: Report) -> dict[Baseline, str]:
    """Return the names of the baselines by key, without the judge if the labels are its own: its agreement is no baseline.

    The n-gram model is left out if the report has no figure of it, as reports of earlier versions.
    """
    absent = {"judge"} if report.evaluator.baselines_on == "judge" else set()
    if report.evaluator.baselines.ngram is None:
        absent.add("ngram")
    return {key: name for key, name in BASELINE_NAMES.items() if key not in absent}


def gold_labels(report: Report) -> str:
    """Return the name of the labels of the figures by gold."""
    return "labels of people" if is_gold_by_people(report) else "gold labels"


def labels_of_pairs(report: Report) -> str:
    """Return the source of the labels of the pairs, other than gold: the judge's or your file's."""
    return "your file's" if report.verdicts.source == "file" else "the judge's"


def baseline_comparisons(report: Report) -> dict[Baseline, Comparison | None]:
    """Return the comparison of the evaluator with each baseline, by key."""
    return _by_baseline(report.evaluator.comparisons)


def _by_baseline(found: EvaluatorComparisons) -> dict[Baseline, Comparison | None]:
    return {
        "judge": compared(found.judge),
        "mean_logprob": compared(found.mean_logprob),
        "ngram": compared(found.ngram),
        "longer_wins": compared(found.longer_wins),
        "first_wins": compared(found.first_wins),
    }


def strongest_baseline(report: Report) -> tuple[str, Figure] | None:
    """Return the name and figure of the best baseline.

    If the labels are the judge's, the judge is right by construction and is not a baseline.
    """
    found = [(BASELINE_NAMES[key], figure) for key, figure in baseline_figures(report).items() if figure is not None]
    return max(found, key=lambda pair: pair[1].known, default=None)


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """Return the rows of the terminal's table: a name and a value or "not measured"."""
    rows = [
        *_accuracy_rows(report),
        *_label_rows(report.labels),
        *_step_rows(report.steps),
        *cost_rows(report),
        *_policy_rows(report.policy),
        *_reply_rows(report.replies),
    ]
    rows.append(("time", duration(report.time.total)))
    rows.append(("peak memory", format_bytes(report.memory.peak_bytes)))
    rows += memory_rows(report.memory)
    rows += [(f"{name}, {who}", value) for who, name, value in server_rows(report.servers or ())]
    return rows + _round_rows(report.rounds or ())


def _accuracy_rows(report: Report) -> list[tuple[str, str]]:
    evaluator = report.evaluator
    given = "your file's" if report.verdicts.source == "file" else "judge's"
    labels = "gold" if evaluator.baselines_on == "gold" else given
    rows = [
        (f"evaluator accuracy, {gold_labels(report)}", describe(evaluator.accuracy_gold)),
        (f"evaluator accuracy, {given} labels", describe(evaluator.accuracy_judge)),
    ]
    figures, comparisons = baseline_figures(report), baseline_comparisons(report)
    names = baseline_names(report)
    rows += [(f"  {name}, {labels} labels", describe(figures[key])) for key, name in names.items()]
    rows += [(f"evaluator minus {name}", describe_difference(comparisons[key])) for key, name in names.items()]
    return rows


def _label_rows(labels: HumanLabels | None) -> list[tuple[str, str]]:
    if labels is None:
        return []
    sure = "none from labels" if labels.threshold.sure is None else f"{labels.threshold.sure:g}"
    return [
        ("labels of people", f"{labels.labels} on {labels.labelled} of {labels.pairs} pairs"),
        ("  evaluator agrees with people", describe(labels.evaluator)),
        ("  judge agrees with people", describe(labels.judge)),
        ("  agreement between people", describe(labels.kappa, as_percent=False)),
        ("  threshold of the evaluator", sure),
    ]


def _step_rows(steps: Steps | None) -> list[tuple[str, str]]:
    if steps is None:
        return []
    return [
        ("step evaluator accuracy, gold labels", describe(steps.accuracy_gold)),
        ("  minus the evaluator", describe_difference(steps.gain)),
        ("step labels on the side of gold", describe(steps.labels_gold)),
    ]


def _policy_rows(policy: Policy) -> list[tuple[str, str]]:
    return [
        ("win rate, after vs. before", undecided(policy) or describe(policy.win_rate)),
        ("  minus one half", describe_difference(policy.comparisons.win_rate)),
        ("gold accuracy before", describe(policy.gold_before)),
        ("gold accuracy after", describe(policy.gold_after)),
        ("  after minus before", describe_difference(policy.comparisons.gold)),
        ("KL to the reference, nats per reply", describe(policy.kl, as_percent=False)),
        ("reply length, ratio of after to before", describe(policy.length_ratio, as_percent=False)),
        *_reference_rows(policy.references, "references"),
        *_reference_rows(policy.seed_references, "replies of the seeds"),
    ]


def _reference_rows(references: ReferenceScores | None, against: str) -> Iterator[tuple[str, str]]:
    for row in references.metrics if references else ():
        name = f"{TEXT_METRICS.get(row.name, row.name)} against {against}"
        yield f"{name}, before", describe(row.before, as_percent=False)
        yield f"{name}, after", describe(row.after, as_percent=False)
        yield f"{name}, after minus before", describe(row.difference, as_percent=False)


def _same_question_rows(found: RepliesPerQuestion | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    return [
        (f"replies to the same question: {name}", describe(getattr(found, field), as_percent=field == "identical"))
        for field, name in SAME_QUESTION.items()
    ]


def _reply_rows(replies: Replies) -> list[tuple[str, str]]:
    return [
        ("replies cut off at the token limit", describe(replies.unfinished)),
        ("  before training", describe(replies.unfinished_before)),
        ("  after training", describe(replies.unfinished_after)),
        *_same_question_rows(replies.per_question),
    ]


def reply_warnings(report: Report) -> tuple[str, ...]:
    """Warn if the token limit cut off more than `UNFINISHED` of any of the replies; empty otherwise."""
    replies = report.replies
    named = (
        (" of the replies", replies.unfinished),
        (" of those before training", replies.unfinished_before),
        (" of those after training", replies.unfinished_after),
    )
    cut = [describe(figure, of=of) for of, figure in named if figure.value is not None and figure.value > UNFINISHED]
    if not cut:
        return ()
    return (
        f"Warning: the token limit cut off {'; '.join(cut)}. The judge and the evaluator read unfinished replies, so their "
        f"figures are of these; {_raising(report)}.",
    )


def warnings(report: Report) -> tuple[str, ...]:
    """Return all warnings of a report as sentences."""
    return (*judge_warnings(report), *reply_warnings(report), *attack_warnings(report))


def judge_warnings(report: Report) -> tuple[str, ...]:
    """Warn if the judge kept less than `KEPT_LITTLE` of the pairs, with the findings of its probe; empty otherwise."""
    kept, probe = report.verdicts.kept_share, report.verdicts.probe
    if report.verdicts.source != "judge" or kept.ci_high is None or kept.ci_high >= KEPT_LITTLE:
        return ()
    findings = () if probe is None else (f"{found.observation}: {found.remedy}." for found in probe.findings)
    said = f"Warning: the judge kept only {describe(kept, of=' of the pairs')}."
    return (" ".join((said, *findings, f"{OTHER_JUDGES}.")),)


def attack_warnings(report: Report) -> tuple[str, ...]:
    """Warn if attack replies of some kind score below the better reply in less than `WITHSTOOD` of cases; empty otherwise."""
    attacks = report.evaluator.attacks
    rows = attacks.kinds if attacks else ()
    weak = sorted((row for row in rows if row.below.known < WITHSTOOD), key=lambda row: row.below.known)
    if not weak:
        return ()
    named = [f"{ATTACKS.get(row.kind, row.kind)} ({describe(row.below, of=' of them below')})" for row in weak[:NAMED]]
    others = f"; and {len(weak) - NAMED} other kinds, in the table of the evaluator" if len(weak) > NAMED else ""
    return (
        f"Warning: the evaluator does not score replies of these kinds below a better reply: {'; '.join(named)}{others}. A "
        "policy may learn to write them, so read its samples; evaluator.attacks and evaluator.mismatched add training pairs "
        "with such replies.",
    )


def _raising(report: Report) -> str:
    """Name the setting that determines the token limit of replies."""
    settings, limit = report.config.get("replies", {}), report.replies.limit
    if settings.get("max_new_tokens") != "auto":
        return f"raise replies.max_new_tokens (now {limit})"
    if limit == settings.get("max_new_tokens_cap"):
        return f"raise replies.max_new_tokens_cap (now {limit})"
    return f"set replies.max_new_tokens to a number above {limit}"


def cost_rows(report: Report) -> list[tuple[str, str]]:
    """Return the rows with seconds and tokens per verdict of the evaluator and the judge."""
    rows = []
    for who, name in COSTS.items():
        figure = _time(report, who)
        rows.append((f"time per verdict, {name}", NOT_MEASURED if figure is None else _timed(figure)))
    for who, name in COSTS.items():
        tokens = _tokens(report, who)
        value = NOT_MEASURED if tokens is None else f"{number(tokens[0])} read, {number(tokens[1])} written"
        rows.append((f"tokens per verdict, {name}", value))
    return rows


def _timed(figure: Figure) -> str:
    if figure.ci_low is None or figure.ci_high is None:
        return f"{seconds(figure.known)} (no interval, n = {figure.n})"
    return f"{seconds(figure.known)} (interval {seconds(figure.ci_low)} to {seconds(figure.ci_high)}, n = {figure.n})"


def _time(report: Report, who: Who) -> Figure | None:
    """Return the seconds per verdict, or None if they were not measured."""
    times = report.time.per_verdict
    return None if times is None else defined(seconds_by(times, who))


def seconds_by(times: SecondsPerVerdict, who: Who) -> Figure:
    """Return the seconds per verdict of one way to obtain it."""
    return {"evaluator": times.evaluator, "scoring": times.scoring, "judge": times.judge}[who]


def tokens_by(tokens: TokensPerVerdict, who: Who) -> TokensOf:
    """Return the tokens per verdict of one way to obtain it."""
    return {"evaluator": tokens.evaluator, "scoring": tokens.scoring, "judge": tokens.judge}[who]


def _tokens(report: Report, who: Who) -> tuple[float, float] | None:
    """Return the tokens read and written per verdict, or None if they were not measured."""
    if report.evaluator.cost is None:
        return None
    tokens = tokens_by(report.evaluator.cost, who)
    read, written = tokens.tokens_read.value, tokens.tokens_written.value
    return None if read is None or written is None else (read, written)


# -- rounds -------------------------------------------------------------------------------------------------------------


def _round_rows(rounds: Sequence[Round]) -> list[tuple[str, str]]:
    """Return the rows of each later round: the evaluator on the pairs of round 1, and the policy against the previous one."""
    found = []
    for row in rounds[1:]:
        name, evaluator = f"round {row.round}", row.evaluator
        accuracy = defined(evaluator.accuracy_gold_first_pairs) or evaluator.accuracy_judge_first_pairs
        found.append((f"{name}: evaluator on round 1's pairs", describe(accuracy)))
        found.append((f"{name}: win rate against the previous round", describe(row.policy.win_rate)))
        found.append((f"{name}: gold accuracy after", describe(row.policy.gold_after)))
    return found


def rounds_sentences(report: Report) -> tuple[str, ...]:
    """Describe up to which round evaluator and policy improved, and the result of the next round; empty for one round.

    Each evaluator is compared with that of the previous round on the pairs of round 1, each policy with the previous one on the
    same questions, by gold, or by the judge without gold.
    """
    rows = report.rounds or ()
    if len(rows) < 2:
        return ()
    whose = "gold" if defined(rows[0].evaluator.accuracy_gold_first_pairs) else "the judge"
    steps = [(row.round, compared(row.evaluator.comparison)) for row in rows[1:]]
    unit = "its accuracy minus that of the previous round is"
    return _progress(f"By {whose}, on round 1's pairs, the evaluator", steps, unit), _policy_progress(rows)


def _policy_progress(rows: Sequence[Round]) -> str:
    by_gold = [(row.round, compared(row.policy.comparisons.gold)) for row in rows]
    if all(comparison is not None for _, comparison in by_gold):
        return _progress("By gold, the policy", by_gold, "its accuracy minus that of the previous policy is")
    by_judge = [(row.round, compared(row.policy.comparisons.win_rate)) for row in rows]
    return _progress("By the judge, the policy", by_judge, "its win rate over the previous policy minus one half is")


def _progress(who: str, steps: list[tuple[int, Comparison | None]], unit: str) -> str:
    """Describe the comparisons between rounds in one sentence."""
    measured = [(number, comparison) for number, comparison in steps if comparison is not None]
    if len(measured) < len(steps):
        return f"{who} was not compared with its predecessor in every round."
    # Index of the first round without a gain.
    reached = next((i for i, (_, step) in enumerate(measured) if step.finding != "better"), len(measured))
    number, comparison = measured[min(reached, len(measured) - 1)]
    shown = describe_difference(comparison)
    if reached == len(measured):
        return f"{who} improved in every round: in the last, round {number}, {unit} {shown}."
    start = f"improved up to round {number - 1} and not further" if reached else "did not improve"
    how = {"worse": "is worse", "too_few": "has too few cases to show a gain"}.get(
        comparison.finding, "shows no significant gain"
    )
    again = " and ".join(str(later) for later, step in measured[reached:] if step.finding == "better")
    rest = f"; it improved again in round {again}" if again else ""
    return f"{who} {start}: round {number} {how}; {unit} {shown}{rest}."


# -- the evaluator ------------------------------------------------------------------------------------------------------


def _evaluator_sentences(report: Report) -> str:
    measured = evaluator_accuracy(report)
    if measured is None:
        return "The evaluator was not measured."
    accuracy, labels = measured
    if labels == "gold":
        start = f"By gold labels, the evaluator picks the better reply in {describe(accuracy, of=' of held-out pairs')}"
    elif report.verdicts.source == "file":
        share = describe(accuracy, of=" of the held-out pairs of your file")
        start = f"By your own labels, the evaluator picks the better reply in {share}"
    else:
        share = describe(accuracy, of=" of the held-out pairs that were kept")
        limit = "By the judge's labels" if is_gold_by_people(report) else "Without gold, only agreement can be measured"
        start = f"{limit}: the evaluator makes the judge's choice in {share}"
    sentences = [f"{start}, {_against_rules(report)}.", _against_judge(report), _people(report), _cost_sentence(report)]
    return " ".join(sentence for sentence in sentences if sentence)


def _people(report: Report) -> str:
    labels = report.labels
    if labels is None or not labels.decided:
        return ""
    evaluator, judge = (
        describe(labels.evaluator, of=" of all judged test pairs"),
        describe(labels.judge, of=" of those it read"),
    )
    return f"By labels of people, it picks the better reply in {evaluator}, and the judge in {judge}."


def _rules(comparisons: EvaluatorComparisons) -> list[tuple[str, Comparison]]:
    """Return the comparisons with the trivial baselines, smallest margin first."""
    found = _by_baseline(comparisons)
    rules = [(BASELINE_NAMES[name], comparison) for name in RULES if (comparison := found[name]) is not None]
    return sorted(rules, key=lambda rule: rule[1].difference.known)


def _hardest(report: Report) -> tuple[str, Comparison] | None:
    return hardest_rule(report.evaluator.comparisons)


def hardest_rule(comparisons: EvaluatorComparisons) -> tuple[str, Comparison] | None:
    """Return the trivial baseline that the evaluator does not beat, with the worst finding first.

    Args:
        comparisons: the evaluator minus each baseline and minus chance level, on the same pairs.

    Returns:
        Name and comparison; None if the evaluator beats all of them, or if there are no pairs.
    """
    chance = compared(comparisons.chance)
    found = [*([("chance level", chance)] if chance else []), *_rules(comparisons)]
    # The gravest finding first; within one, chance level, then the rule with the smallest margin.
    for finding in ("worse", "too_few", "unclear"):
        hit = next((rule for rule in found if rule[1].finding == finding), None)
        if hit:
            return hit
    return None


def _against_rules(report: Report) -> str:
    hardest, rules = _hardest(report), _rules(report.evaluator.comparisons)
    if hardest is None:
        if not rules:
            return "and no trivial baseline was measured on the same pairs"
        name, comparison = rules[0]
        return (
            f"more than every trivial baseline on the same pairs; the margin over the strongest, {name}, is "
            f"{describe_difference(comparison)}"
        )
    name, comparison = hardest
    if comparison.finding == "worse":
        return f"which is worse than {name}, by {describe_difference(comparison, turned=True)}"
    if comparison.finding == "too_few":
        return "too few for a conclusion"
    return f"which is not significantly better than {name}: the difference is {_describe_unclear(comparison)}"


def _against_judge(report: Report) -> str:
    comparison = compared(report.evaluator.comparisons.judge)
    if comparison is None:
        return ""
    if comparison.finding == "better":
        return f"It is more accurate than its judge, by {describe_difference(comparison)}."
    if comparison.finding == "worse":
        return f"It is less accurate than its judge, by {describe_difference(comparison, turned=True)}."
    if comparison.finding == "too_few":
        return f"There are too few pairs to compare it with its judge ({tested(comparison)}, n = {comparison.difference.n})."
    return f"It does not differ significantly from its judge: {_describe_unclear(comparison)}."


def _describe_unclear(comparison: Comparison) -> str:
    """Describe a difference that is not claimed, with an explanation if interval and test disagree."""
    description, (low, high) = describe_difference(comparison), (comparison.difference.ci_low, comparison.difference.ci_high)
    if comparison.finding != "unclear" or low is None or high is None or low <= 0 <= high:
        return description
    return f"{description}; the interval excludes 0, but the exact test is not significant, and both are required"


def _cost_sentence(report: Report) -> str:
    """Compare time and tokens per verdict with those of the judge, and state whether the evaluator replaces it."""
    ours, judge = _cost(report, "evaluator"), _time(report, "judge")
    if ours is None or judge is None:
        return "The cost per verdict was not measured."
    judges = _tokens(report, "judge")
    instead = f" (judge: {number(sum(judges))})" if judges else ""
    sentence = f"Per verdict, the judge takes {seconds(judge.known)} and the evaluator {ours.description}{instead}"
    scoring = _cost(report, "scoring")
    if scoring is not None and scoring.time.known < ours.time.known:
        sentence += f"; if the question's reference answer is known, {scoring.description}"
    return f"{sentence}.{_success(report)}"


@dataclass(frozen=True)
class _Cost:
    """Cost of a way to obtain a verdict: its time, the ratio of the judge's time to it, and a description with the tokens."""

    time: Figure
    ratio: Figure
    description: str

    @property
    def is_faster(self) -> bool:
        """Whether the interval of the ratio is entirely above 1."""
        return self.ratio.ci_low is not None and self.ratio.ci_low > 1


def _cost(report: Report, who: Literal["evaluator", "scoring"]) -> _Cost | None:
    times = report.time.per_verdict
    if times is None:
        return None
    time = defined(seconds_by(times, who))
    ratio = defined({"evaluator": times.judge_over_evaluator, "scoring": times.judge_over_scoring}[who])
    if time is None or ratio is None or ratio.known <= 0:
        return None
    speed = f"{_times_word(ratio.known)} faster" if ratio.known >= 1 else f"{_times_word(1 / ratio.known)} slower"
    tokens = _tokens(report, who)
    return _Cost(time, ratio, f"{seconds(time.known)}, {speed}" + (f", with {number(sum(tokens))} tokens" if tokens else ""))


def _times_word(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _speed(report: Report) -> str | None:
    """Describe how much faster than its judge the evaluator is, or return None if that is not shown."""
    whole, scoring = _cost(report, "evaluator"), _cost(report, "scoring")
    if whole is not None and whole.is_faster:
        return f"{_times_word(whole.ratio.known)} faster"
    if scoring is not None and scoring.is_faster:
        return f"{_times_word(scoring.ratio.known)} faster if the reference answer is known"
    return None


def _is_close(comparison: Comparison) -> bool:
    low = comparison.difference.ci_low
    return comparison.finding != "too_few" and low is not None and low > -CLOSE


def _success(report: Report) -> str:
    comparison, speed = compared(report.evaluator.comparisons.judge), _speed(report)
    # All of: compared with its judge, better than every trivial rule, faster, and close to the judge.
    if comparison is None or _hardest(report) is not None or speed is None or not _is_close(comparison):
        return ""
    if comparison.finding != "worse":
        return f" Distillation succeeded: the evaluator is {speed}, and at most {points(CLOSE)} worse than its judge."
    loss = points(-comparison.difference.known)
    return f" Distillation succeeded: the evaluator loses {loss} and is {speed}."


def _evaluator_badge(report: Report) -> Badge:
    if evaluator_accuracy(report) is None:
        return Badge("unmeasured", NOT_MEASURED)
    hardest = _hardest(report)
    if hardest is not None:
        return _obstacle_badge(*hardest)
    judge = compared(report.evaluator.comparisons.judge)
    if judge is None or judge.finding in ("unclear", "too_few"):
        return Badge("better", "▲ better than trivial baselines")
    if judge.finding == "better":
        return Badge("better", "▲ better than its judge")
    speed = _speed(report)
    if speed is not None and _is_close(judge):
        return Badge("better", f"▲ {points(-judge.difference.known)} below its judge, {speed}")
    return Badge("worse", "▼ worse than its judge")


def _obstacle_badge(name: str, comparison: Comparison) -> Badge:
    if comparison.finding == "worse":
        return Badge("worse", f"▼ worse than {name}")
    return Badge("unclear", "◇ too few pairs" if comparison.finding == "too_few" else f"◇ not significantly better than {name}")


# -- the policy ---------------------------------------------------------------------------------------------------------


def _policy_comparison(policy: Policy | RoundPolicy) -> Comparison | None:
    """Return the comparison of the policy with its start, by gold if it was measured, otherwise by the judge."""
    return compared(policy.comparisons.gold) or compared(policy.comparisons.win_rate)


def undecided(policy: Policy) -> str:
    """State that the referee decided no comparison; empty if it decided one, or if there was none to decide."""
    if policy.win or policy.loss or not policy.tie:
        return ""
    return f"the referee decided none of {policy.tie:,} comparisons: no preference, or the two orders disagree"


def _policy_badge(policy: Policy) -> Badge:
    comparison = _policy_comparison(policy)
    if comparison is None:
        return Badge("unmeasured", NOT_MEASURED)
    if compared(policy.comparisons.gold) is None and undecided(policy):
        return Badge("unclear", "◇ nothing decided")
    words: dict[str, Badge] = {
        "better": Badge("better", "▲ better"),
        "worse": Badge("worse", "▼ worse"),
        "too_few": Badge("unclear", "◇ too few questions"),
    }
    return words.get(comparison.finding, Badge("unclear", "◇ no significant gain"))


def _policy_sentence(policy: Policy) -> str:
    by_gold, by_judge = compared(policy.comparisons.gold), compared(policy.comparisons.win_rate)
    if by_gold is not None:
        return f"{_gold_clause(policy, by_gold)}{_win_clause(policy, by_gold, by_judge)}."
    if by_judge is None:
        return "The policy's gain was not measured."
    start = "Without gold, only the judge's preference can be measured"
    if nothing := undecided(policy):
        return f"{start}: {nothing}."
    rate = f"{describe(policy.win_rate)}, ties counting half"
    test = f"minus one half: {describe_difference(by_judge)}"
    return {
        "better": f"{start}: it prefers the new policy's replies, with a win rate of {rate} ({test}).",
        "worse": f"{start}: it prefers the old policy's replies, with a win rate of {rate} ({test}).",
        "too_few": f"{start}: there are too few comparisons for a conclusion, with a win rate of {rate} ({test}).",
    }.get(by_judge.finding, f"{start}: there is no significant gain, with a win rate of {rate} ({test}).")


def _gold_clause(policy: Policy, comparison: Comparison) -> str:
    shares = f"from {describe(policy.gold_before)} to {describe(policy.gold_after)}"
    if comparison.finding == "better":
        return f"The policy improved: its gold accuracy rose {shares}, by {describe_difference(comparison)}"
    if comparison.finding == "worse":
        fell = describe_difference(comparison, turned=True)
        return f"The policy got worse: its gold accuracy fell {shares}, by {fell}"
    start = "Too few questions to show a gain" if comparison.finding == "too_few" else "No significant gain"
    return f"{start}: the gold accuracy went {shares}, a difference of {_describe_unclear(comparison)}"


def _win_clause(policy: Policy, by_gold: Comparison, by_judge: Comparison | None) -> str:
    if by_judge is None:
        return "; the win rate was not measured"
    if nothing := undecided(policy):
        return f"; {nothing}"
    rate = f"with a win rate of {describe(policy.win_rate).removesuffix(')')}, {tested(by_judge)})"
    if by_judge.finding in ("unclear", "too_few"):
        return f"; the judge shows no significant preference, {rate}"
    side = "new" if by_judge.finding == "better" else "old"
    if by_gold.finding == by_judge.finding:
        return f", and the judge also prefers the {side} replies, {rate}"
    if by_gold.finding == "worse":
        return f", but the judge prefers the {side} replies, {rate}: they please the judge without being right"
    return f", but the judge prefers the {side} replies, {rate}"
