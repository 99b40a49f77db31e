"""The content of the page's sections: plain data and finished charts, from the report and the metrics.

There is one function per section, which also states what was not measured. The template only does the layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.charts import Bar, Bin, Line, Mark, Part, Track
from selfeval.report.diversity import diversity_rows, diversity_sentence
from selfeval.report.drawing import (
    bar_chart,
    interval_tracks,
    line_chart,
    reliability_chart,
    risk_coverage_chart,
    stacked_bar,
)
from selfeval.report.figures import (
    NOT_MEASURED,
    cells,
    compared,
    count,
    defined,
    describe,
    describe_difference,
    difference_cells,
    duration,
    finite,
    number,
    percent,
    tested,
)
from selfeval.report.labels import is_gold_by_people, label_sentences
from selfeval.report.map_points import MapPoint
from selfeval.report.map_section import map_section, sample_anchor, sample_links
from selfeval.report.memory import memory_rows
from selfeval.report.reading import Metrics, Rows
from selfeval.report.schema import (
    Alarm,
    Attacks,
    Dropped,
    Evaluator,
    EvaluatorConfidence,
    HumanLabels,
    JudgeCalibration,
    JudgeMember,
    JudgeProbe,
    JudgeSignals,
    Labels,
    OverOptimisation,
    Policy,
    ReferenceScores,
    Replies,
    RepliesPerQuestion,
    Report,
    Round,
    Sample,
    Steps,
    UnitTests,
    Verdicts,
)
from selfeval.report.servers import server_rows
from selfeval.report.summary import (
    ATTACKS,
    BASELINE_NAMES,
    COSTS,
    SAME_QUESTION,
    TEXT_METRICS,
    badges,
    baseline_comparisons,
    baseline_figures,
    baseline_names,
    evaluator_accuracy,
    gold_labels,
    labels_of_pairs,
    rounds_sentences,
    seconds_by,
    strongest_baseline,
    tokens_by,
    undecided,
    verdict_sentences,
    warnings,
)
from selfeval.texts import format_bytes

__all__ = [
    "CAUSES",
    "CURVES",
    "MEANINGS",
    "SMOOTHING",
    "SMOOTH_FROM",
    "all_sections",
    "column",
    "config_tables",
    "evaluator_curves",
    "flat",
    "metric_curves",
    "policy_curves",
]

View = dict[str, Any]
FigureRow = tuple[str, str, str, str, str]
"""Name, value, interval, n, and the field of the report, to which a page may add a link; empty: the row has no single field."""

SMOOTHING = 0.25
SMOOTH_FROM = 20
SAMPLES_OPEN = 6

CURVES = (
    ("Reward", "Training signal of the policy: the evaluator's score minus the KL penalty.",
     (("reward", "reward"), ("score", "score"))),
    ("KL to the reference", "Nats per reply: the policy's distance from the initial policy.", (("kl", "KL"),)),
    ("Reply length", "Tokens per reply. A steady climb means that length is being rewarded.",
     (("length", "length"),)),
    ("Entropy", "Nats per token. At zero the policy has stopped exploring.",
     (("entropy", "entropy"),)),
    ("Policy loss", "The clipped surrogate. It stays near zero by design; look for jumps.",
     (("policy_loss", "policy loss"),)),
    ("Value loss", "Squared error of the critic's prediction of the return.", (("value_loss", "value loss"),)),
    ("Explained variance", "Share of the returns' variance that the critic explains. Below zero is worse than a constant.",
     (("explained_variance", "explained variance"),)),
    ("Clip fraction", "Share of tokens whose ratio was clipped. A high share means that steps are too large.",
     (("clip_fraction", "clip fraction"),)),
)  # fmt: skip
MORE_CURVES = (
    ("KL coefficient", "Penalty per nat.", (("kl_coefficient", "KL coefficient"),)),
    ("Approximate KL", "Between the policy before and after one update.", (("approximate_kl", "approximate KL"),)),
    ("Similarity of replies", "To different questions, by their bigrams. Near one, all questions get the same reply.",
     (("similarity", "similarity"),)),
    ("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),)),
    ("Seconds per step", "Rollout, scoring and update together.", (("seconds", "seconds"),)),
)  # fmt: skip
STAGE_STYLES = ("p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8")
MEANINGS = {
    "kept": "The judge's probability of one reply reached verdicts.keep; kept pairs train the evaluator.",
    "tie": "The judge's probability that neither reply is better exceeded verdicts.tie.",
    "unsure": "The judge's probability stayed below verdicts.keep: its choice depended on the order, its votes were split, "
    "or it was not confident.",
    "unparsable": "The judge's answer could not be read; it never counts as a preference.",
}
"""Meaning of each state of a verdict."""
CAUSES = {
    "cut": "cut off at the token limit before a verdict",
    "loop": "cut off while repeating a block of text",
    "label_mass": "with too little probability on the verdict labels",
    "no_room": "that did not fit the model's context",
    "no_lead": "that ended without a verdict, with no lead to append",
    "no_answer": "that ended without an answer",
    "truncated": "cut off at the token limit and read after an appended lead",
    "refused": "that refused to judge",
}
"""Causes of outputs of the judge without a readable verdict."""


def all_sections(
    report: Report, metrics: Metrics, points: Sequence[MapPoint] = (), questions: Mapping[str, str] | None = None
) -> View:
    """Return the variables of the template, one entry per section.

    Args:
        report: the report of a run.
        metrics: rows of each `metrics/<stage>.jsonl`, by stage; any stage may be missing.
        points: Optional. Points of the map of the domain.
        questions: Optional. Addresses of the pages of questions by id. Default: the map leads to the samples of the page.
    """
    links = sample_links(points, report.samples) if questions is None else questions
    link_text = "Go to the replies to this question" if questions is None else "Open the page of this question"
    return {
        "head": _head(report),
        "verdict": _verdict(report),
        "headline": [_headline_evaluator(report), _headline_gold(report.policy), _headline_wins(report.policy)],
        "rounds": _rounds(report),
        "policy": _policy(report.policy),
        "curves": _curves(report.policy, metrics),
        "evaluator": _evaluator(report, metrics.get("evaluator", [])),
        "verdicts": _verdicts(report.verdicts, people=is_gold_by_people(report)),
        "labels": _labels(report.labels),
        "domain_map": map_section(report.domain_map, points, links, link_text),
        "warnings": warnings(report),
        "replies": _replies(report.replies),
        "samples": _samples(report.samples),
        "dropped": _dropped(report.dropped),
        "cost": _cost(report),
        "data": [(name.replace("_", " "), count(value), f"data.{name}") for name, value in report.data],
        "config": config_tables(report.config),
        "prompts": [(name, text) for name, text in report.prompts.items() if text],
        "versions": list(report.versions.items()),
    }


def column(rows: Rows, key: str) -> tuple[list[tuple[float, float]], int]:
    """Return the (step, value) points of a metric, and the number of values that are not finite.

    >>> column([{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": float("nan")}], "kl")
    ([(1.0, 0.5)], 1)
    """
    points, broken = [], 0
    for order, row in enumerate(rows, start=1):
        step, value = finite(row.get("step", order)), finite(row.get(key))
        if step is not None and value is not None:
            points.append((step, value))
        # NaN or infinite; a missing key or null is simply not measured.
        elif isinstance(row.get(key), float):
            broken += 1
    return points, broken


def _head(report: Report) -> View:
    model = report.model
    facts = [
        ("model", model.name),
        ("architecture", model.model_type),
        ("parameters", count(model.parameters)),
        ("precision", model.precision),
        ("domain", model.domain or "your own questions"),
    ]
    if model.gold_file is not None:
        facts.append(("gold file", PurePath(model.gold_file).name))
    elif model.domain is None:
        facts.append(("gold answers", "none"))
    facts += [("random seed", str(report.seed)), ("time", duration(report.time.total))]
    return {"name": report.name or "unnamed run", "facts": facts}


def _verdict(report: Report) -> list[View]:
    policy = report.policy
    by_judge = (
        defined(report.evaluator.accuracy_gold) is None or is_gold_by_people(report),
        defined(policy.gold_before) is None or defined(policy.gold_after) is None,
    )
    findings = []
    for who, judged, text, badge in zip(
        ("Evaluator", "Policy"), by_judge, verdict_sentences(report), badges(report), strict=True
    ):
        word = f"{badge.word}, by judge" if judged and badge.standing != "unmeasured" else badge.word
        # No line break between a sign and its number.
        unbroken = text.replace("n = ", "n\u00a0=\u00a0").replace("p = ", "p\u00a0=\u00a0")
        findings.append({"whose": who, "text": unbroken, "standing": badge.standing, "word": word})
    return findings


def _headline(title: str, value: str, under: str, picture: str = "", field: str = "") -> View:
    return {"title": title, "value": value, "under": under, "picture": Markup(picture), "field": field}


def _interval(figure: Figure) -> str:
    if figure.ci_low is None or figure.ci_high is None:
        return f"no interval, n = {count(figure.n)}"
    return f"interval {percent(figure.ci_low)} to {percent(figure.ci_high)}, n = {count(figure.n)}"


_TRACK_NAMES = dict(zip(BASELINE_NAMES.values(), ("judge", "log-prob", "n-gram", "longer", "first"), strict=True))
"""Short names of the baselines, which fit next to their intervals on the card."""


def _headline_evaluator(report: Report) -> View:
    measured = evaluator_accuracy(report)
    if measured is None:
        return _headline("Evaluator accuracy", "–", NOT_MEASURED)
    figure, labels = measured
    tracks, baseline = [_track("evaluator", figure, accent=True)], strongest_baseline(report)
    if baseline is not None:
        tracks.append(_track(_TRACK_NAMES[baseline[0]], baseline[1]))
    label = f"Evaluator {describe(figure)}" + (f"; {baseline[0]} {describe(baseline[1])}" if baseline else "")
    title = "Evaluator accuracy, by gold" if labels == "gold" else "Evaluator agrees with judge"
    picture = interval_tracks(tracks, label=label, reference=0.5)
    return _headline(title, percent(figure.known), _interval(figure), picture, f"evaluator.accuracy_{labels}")


def _headline_gold(policy: Policy) -> View:
    before, after = defined(policy.gold_before), defined(policy.gold_after)
    title = "Gold accuracy, before and after"
    if before is None or after is None:
        return _headline(title, "–", "gold was not measured both before and after")
    tracks = [_track("before", before), _track("after", after, accent=True)]
    picture = interval_tracks(tracks, label=f"Before {describe(before)}; after {describe(after)}")
    under = f"by {describe_difference(policy.comparisons.gold)}"
    return _headline(title, f"{percent(before.known)} → {percent(after.known)}", under, picture, "policy.comparisons.gold")


def _headline_wins(policy: Policy) -> View:
    wins, decisive = defined(policy.win_rate), defined(policy.win_rate_decisive)
    if wins is None:
        return _headline("Win rate, after vs. before", "–", NOT_MEASURED)
    if nothing := undecided(policy):
        return _headline("Win rate, after vs. before", "–", nothing)
    tracks = [_track("win rate", wins, accent=True)]
    if decisive is not None:
        tracks.append(_track("without ties", decisive))
    picture = interval_tracks(tracks, label=f"Win rate {describe(wins)}", reference=0.5)
    return _headline("Win rate, after vs. before", percent(wins.known), _interval(wins), picture, "policy.win_rate")


def _track(name: str, figure: Figure, *, accent: bool = False) -> Track:
    return Track(name, figure.known, figure.ci_low, figure.ci_high, accent)


def _bar(name: str, figure: Figure, *, accent: bool = False) -> Bar:
    return Bar(name, figure.known, figure.ci_low, figure.ci_high, f"{percent(figure.known)}, n = {figure.n:,}", accent)


def _policy(policy: Policy) -> View:
    wins = [
        ("ties count half", policy.win_rate, "win_rate"),
        ("ties dropped", policy.win_rate_decisive, "win_rate_decisive"),
        ("length controlled", policy.length_controlled, "length_controlled"),
    ]
    bars = [_bar(name, figure, accent=True) for name, figure, _ in wins if defined(figure)]
    chart = bar_chart(bars, label="Win rate of the new policy against the old", reference=0.5) if bars else ""
    rows = [
        ("Gold accuracy, before", *cells(policy.gold_before), "policy.gold_before"),
        ("Gold accuracy, after", *cells(policy.gold_after), "policy.gold_after"),
        _difference_row("Gold accuracy, after minus before", policy.comparisons.gold, "policy.comparisons.gold"),
        *((f"Win rate, {name}", *cells(figure), f"policy.{field}") for name, figure, field in wins),
        _difference_row("Win rate minus one half", policy.comparisons.win_rate, "policy.comparisons.win_rate"),
        ("KL to the reference, nats per reply", *cells(policy.kl, as_percent=False), "policy.kl"),
        ("Reply length, ratio of after to before", *cells(policy.length_ratio, as_percent=False), "policy.length_ratio"),
        *_reference_rows(policy.references, "references", "references"),
        *_reference_rows(policy.seed_references, "replies of the seeds, not held out", "seed_references"),
    ]
    parts = [
        Part("win", policy.win, "p1"),
        Part("tie", policy.tie, "p3"),
        Part("loss", policy.loss, "p2"),
        Part("unparsable", policy.unparsable, "p4"),
    ]
    return {
        "wins": Markup(chart),
        "rows": rows,
        "outcomes": _stack(parts, "Comparisons of the new policy's replies with the old policy's", "policy"),
        "diversity": diversity_rows(policy.diversity),
        "diversity_sentence": diversity_sentence(policy.diversity) if policy.diversity else "",
        "watchdogs": [_alarm_row(alarm, place) for place, alarm in enumerate(policy.watchdogs)],
    }


def _reference_rows(references: ReferenceScores | None, against: str, field: str) -> Iterator[FigureRow]:
    if references is None:
        return
    language = f" (language: {references.language})"
    for place, row in enumerate(references.metrics):
        name = f"{TEXT_METRICS.get(row.name, row.name)} against {against}"
        path = f"policy.{field}.metrics.{place}"
        yield f"{name}, before{language}", *cells(row.before, as_percent=False), f"{path}.before"
        yield f"{name}, after", *cells(row.after, as_percent=False), f"{path}.after"
        yield f"{name}, after minus before", *cells(row.difference, as_percent=False), f"{path}.difference"


def _alarm_row(alarm: Alarm, place: int) -> View:
    step = str(alarm.step) if alarm.seen_at is None else f"{alarm.seen_at}, rolled back to {alarm.step}"
    return {
        "step": step,
        "name": alarm.name.replace("_", " "),
        "message": alarm.message,
        "action": alarm.action,
        "field": f"policy.watchdogs.{place}.step",
    }


def _difference_row(name: str, difference: Comparison | None, field: str) -> FigureRow:
    """Return a paired difference as a row of a table of figures, with its test in the name."""
    comparison = compared(difference)
    if comparison is None:
        return name, *difference_cells(None), field
    full_name = f"{name} ({comparison.wins:,} won, {comparison.losses:,} lost, {tested(comparison)})"
    return full_name, *difference_cells(comparison), field


def _rounds(report: Report) -> View:
    """Return evaluator and policy by round; empty for a run of one round."""
    rows = report.rounds or ()
    # Decided by round 1 for all rounds, because their figures are compared with each other.
    by_gold = bool(rows) and defined(rows[0].evaluator.accuracy_gold_first_pairs) is not None
    labels: Labels = "gold" if by_gold else "judge"
    evaluators = _by_round(rows, [_on_first_pairs(row, labels) for row in rows])
    policies = _by_round(rows, [row.policy.gold_after if by_gold else row.policy.win_rate for row in rows])
    start = defined(rows[0].policy.gold_before) if by_gold else None
    if start is not None:
        policies = {0: start, **policies}
    caption = "Gold accuracy; round 0 is the base." if start else "Win rate over the previous round, by the judge."
    return {
        "sentences": rounds_sentences(report),
        "labels": labels,
        "pictures": [
            _round_chart("Evaluators on round 1's pairs", f"Accuracy, by {labels}; the band is the interval.", evaluators),
            _round_chart("Policies on the test questions", caption, policies),
        ],
        "rows": [_round_row(row, labels, f"rounds.{place}") for place, row in enumerate(rows)],
    }


def _on_first_pairs(row: Round, labels: Labels) -> Figure | None:
    evaluator = row.evaluator
    return evaluator.accuracy_gold_first_pairs if labels == "gold" else evaluator.accuracy_judge_first_pairs


def _by_round(rows: Sequence[Round], figures: Sequence[Figure | None]) -> dict[int, Figure]:
    """Return the figures by round, without the rounds that have none."""
    return {row.round: figure for row, figure in zip(rows, figures, strict=True) if figure is not None and defined(figure)}


def _round_chart(title: str, caption: str, figures: dict[int, Figure]) -> View:
    points = [(float(number), figure.known) for number, figure in figures.items()]
    ends = [(f.ci_low, f.ci_high) for f in figures.values()]
    band = [(low, high) for low, high in ends if low is not None and high is not None]
    # A band needs both ends at every point.
    line = Line("share", points, band=band if len(band) == len(points) else None)
    picture = line_chart([line], label=title, x_label="round", percent_axes="y") if points else ""
    return {"title": title, "caption": caption, "picture": Markup(picture)}


def _round_row(row: Round, labels: Labels, field: str) -> View:
    """Return the cells of a round in the two tables: value, interval, n and field of each figure."""
    evaluator, policy = row.evaluator, row.policy
    return {
        "round": row.round,
        "evaluator": [
            (*cells(_on_first_pairs(row, labels)), f"{field}.evaluator.accuracy_{labels}_first_pairs"),
            (*cells(evaluator.accuracy_gold), f"{field}.evaluator.accuracy_gold"),
            (*cells(evaluator.accuracy_judge), f"{field}.evaluator.accuracy_judge"),
        ],
        "pairs": count(evaluator.pairs_trained),
        "policy": [
            (*cells(policy.win_rate), f"{field}.policy.win_rate"),
            (*cells(policy.gold_before), f"{field}.policy.gold_before"),
            (*cells(policy.gold_after), f"{field}.policy.gold_after"),
            (*cells(policy.kl, as_percent=False), f"{field}.policy.kl"),
        ],
        "outcomes": [(count(getattr(policy, name)), f"{field}.policy.{name}") for name in ("win", "tie", "loss")],
    }


def _stack(parts: Sequence[Part], label: str, field: str) -> View | None:
    """Return a stacked bar and the rows of its table, or None if all amounts are 0.

    Args:
        parts: the parts, named as the fields of the report that count them.
        label: name of the picture.
        field: the part of the report that has these fields.
    """
    whole = sum(part.amount for part in parts)
    if whole <= 0:
        return None
    rows = [(part.name, part.style, count(part.amount), percent(part.amount / whole), f"{field}.{part.name}") for part in parts]
    return {"picture": Markup(stacked_bar(parts, label=label)), "rows": rows}


def _curves(policy: Policy, metrics: Metrics) -> View:
    rows, marks = metrics.get("policy", []), _marks(policy.watchdogs)
    shown, more = policy_curves(rows, policy.watchdogs)
    by_gold = [_gold_curve(metrics.get("evaluation", []), marks), _overoptimisation(policy.overoptimisation)]
    return {"shown": [*by_gold, *shown], "more": more, "measured": bool(rows)}


def _marks(alarms: Sequence[Alarm]) -> list[Mark]:
    return [
        Mark(alarm.step if alarm.seen_at is None else alarm.seen_at, f"step {alarm.step}, {alarm.name}: {alarm.message}")
        for alarm in alarms
    ]


def policy_curves(rows: Rows, alarms: Sequence[Alarm]) -> tuple[list[View], list[View]]:
    """Return the charts of policy training: the main ones, and all others.

    Args:
        rows: metrics of the stage `policy`.
        alarms: alarms of the watchdogs, marked in every chart.
    """
    marks = _marks(alarms)
    shown = [_curve(rows, title, caption, keys, marks) for title, caption, keys in CURVES]
    known = {"step"} | {key for _, _, keys in (*CURVES, *MORE_CURVES) for key, _ in keys}
    more = [_curve(rows, title, caption, keys, marks) for title, caption, keys in MORE_CURVES]
    # Metrics without a predefined chart are drawn too.
    return shown, [*more, *metric_curves(rows, known, marks)]


def metric_curves(rows: Rows, known: Collection[str] = ("step",), marks: Sequence[Mark] = ()) -> list[View]:
    """Return a chart of each metric that has a number, except the known ones, by name."""
    unknown = sorted({key for row in rows for key in row if finite(row[key]) is not None} - set(known))
    return [_curve(rows, key.replace("_", " ").capitalize(), "", ((key, key),), marks) for key in unknown]


def evaluator_curves(rows: Rows) -> list[View]:
    """Return the charts of evaluator training, from the metrics of the stage `evaluator`."""
    return [
        _curve(rows, "Evaluator loss", "Bradley-Terry loss on the training pairs.", (("loss", "loss"),)),
        _curve(
            rows,
            "Evaluator accuracy during training",
            "On each batch of training pairs, before its update.",
            (("accuracy", "batch"),),
            shares="y",
        ),
    ]


def _overoptimisation(found: OverOptimisation | None) -> View:
    """Return predicted and actual accuracy over the policy's distance from the initial policy; needs gold."""
    title = "Predicted and actual accuracy"
    if found is None or not found.points:
        return {"title": title, "caption": "Not available: no gold, or too few iterations.", "picture": ""}
    lines = [Line(name, sorted((row[0], row[at]) for row in found.points)) for at, name in ((1, "predicted"), (2, "gold"))]
    xs = sorted({x for line in lines for x, _ in line.points})
    fits = (("predicted", found.fit.evaluator), ("gold", found.fit.gold))
    for (name, fit), base in zip(fits, found.start, strict=True):
        # At a distance of 0, x log x has the limit 0 although log x is undefined.
        gains = [(x, x * (fit.alpha - fit.beta * math.log(x)) if x > 0 else 0.0) for x in _between(xs[0], xs[-1])]
        lines.append(Line(f"{name}, fitted", [(x, base + gain) for x, gain in gains]))
    caption = (
        "Gold accuracy, and the accuracy predicted from the evaluator's scores, over the square root of the KL to the initial "
        "policy "
        f"(Gao et al. 2022). Predicted minus actual in the last quarter: {describe(found.gap)}."
    )
    picture = line_chart(lines, label=title, x_label="square root of the KL", percent_axes="y", whole_x=False)
    return {"title": title, "caption": caption, "picture": Markup(picture)}


def _between(low: float, high: float, steps: int = 40) -> list[float]:
    return [low + (high - low) * k / steps for k in range(steps + 1)]


def _curve(
    rows: Rows, title: str, caption: str, keys: Sequence[tuple[str, str]], marks: Sequence[Mark] = (), shares: str = ""
) -> View:
    """Return a chart of metrics, or a sentence that it was not measured."""
    lines, broken = [], 0
    for key, name in keys:
        points, missing = column(rows, key)
        broken += missing
        if points:
            lines.append(Line(name, points, smoothing=SMOOTHING if len(points) >= SMOOTH_FROM else 0.0))
    picture = line_chart(lines, label=title, marks=marks, percent_axes=shares) if lines else ""
    if broken:
        caption = f"{caption} {broken} value{'s were' if broken > 1 else ' was'} not finite and cannot be drawn."
    return {"title": title, "caption": caption.strip(), "picture": Markup(picture)}


def _gold_curve(rows: Rows, marks: Sequence[Mark]) -> View:
    caption = "Gold accuracy of the replies; training never sees gold."
    cases = sorted({int(n) for row in rows if (n := finite(row.get("n"))) is not None})
    if cases:
        caption += f" n = {cases[0]:,}" + (f" to {cases[-1]:,}" if cases[-1] > cases[0] else "") + " per point."
    return _curve(rows, "Gold over training", caption, (("gold", "gold"),), marks, shares="y")


def _evaluator(report: Report, rows: Rows) -> View:
    return {
        "rows": _evaluator_rows(report),
        "baselines": _baselines(report),
        "risk": _risk(report.evaluator),
        "calibration": _calibration(report.evaluator),
        "training": evaluator_curves(rows),
    }


def _evaluator_rows(report: Report) -> list[FigureRow]:
    evaluator, comparisons = report.evaluator, baseline_comparisons(report)
    rows = [
        (f"Accuracy on held-out pairs, {gold_labels(report)}", *cells(evaluator.accuracy_gold), "evaluator.accuracy_gold"),
        (
            f"Accuracy on held-out pairs, {labels_of_pairs(report)} labels",
            *cells(evaluator.accuracy_judge),
            "evaluator.accuracy_judge",
        ),
        ("Expected calibration error", *cells(evaluator.ece, as_percent=False), "evaluator.ece"),
        ("Brier score", *cells(evaluator.brier, as_percent=False), "evaluator.brier"),
        *(
            _difference_row(f"Accuracy minus that of {name}, same pairs", comparisons[key], f"evaluator.comparisons.{key}")
            for key, name in baseline_names(report).items()
        ),
        _difference_row("Accuracy minus one half, same pairs", evaluator.comparisons.chance, "evaluator.comparisons.chance"),
        *_cost_rows(report),
        _plain_row("Temperature of the scores", _temperature(evaluator)),
        *_confidence_rows(evaluator.confidence),
        _plain_row("Training pairs", count(evaluator.pairs_trained)),
        _plain_row("Members", count(evaluator.members)),
    ]
    if report.steps is not None:
        rows += _step_rows(report.steps)
    if evaluator.attacks is not None:
        rows += _attack_rows(evaluator.attacks)
    if evaluator.disagreement is not None:
        correlation = evaluator.disagreement.error_correlation
        field = "evaluator.disagreement.error_correlation"
        rows.append(("Member disagreement, rank correlation with errors", *cells(correlation, as_percent=False), field))
    return rows


def _confidence_rows(found: EvaluatorConfidence | None) -> list[FigureRow]:
    if found is None:
        return []
    areas = [NOT_MEASURED if area is None else number(area) for area in (found.aurc, found.aurc_of_margin)]
    second = f"isotonic regression of {count(len(found.steps))} points" if found.steps else f"factor {found.scale:.3f}"
    weights = f"{found.choice:+.3f}, {found.margin:+.3f}, {found.disagreement:+.3f}"
    return [
        _plain_row("Confidence: weights of preference, margin and disagreement of the members", weights),
        _plain_row("Confidence: map of their sum", second),
        (
            "Expected calibration error, confidence of the margin alone",
            *cells(found.ece_of_margin, as_percent=False),
            "evaluator.confidence.ece_of_margin",
        ),
        _plain_row("Area under the risk-coverage curve", areas[0]),
        _plain_row("Area under the risk-coverage curve, confidence of the margin alone", areas[1]),
    ]


def _plain_row(name: str, value: str, n: str = "", field: str = "") -> FigureRow:
    """Return a row of a value without an interval."""
    return name, value, "", n, field


def _step_rows(steps: Steps) -> Iterator[FigureRow]:
    yield "Step evaluator: accuracy on held-out pairs, gold labels", *cells(steps.accuracy_gold), "steps.accuracy_gold"
    yield _difference_row("Step evaluator: accuracy minus that of the evaluator, same pairs", steps.gain, "steps.gain")
    yield "Step labels on the side of gold", *cells(steps.labels_gold), "steps.labels_gold"
    yield _plain_row("Step labels", count(steps.steps))
    yield _plain_row("Replies with step labels", count(steps.replies))


def _attack_rows(attacks: Attacks) -> Iterator[FigureRow]:
    other = "a right reply" if attacks.against == "right" else "an ordinary reply"
    yield f"Attacks scored below {other}, all kinds", *cells(attacks.total), "evaluator.attacks.total"
    if attacks.held_out is not None:
        yield f"Attacks scored below {other}, kinds not trained against", *cells(attacks.held_out), "evaluator.attacks.held_out"
    for place, row in enumerate(attacks.kinds):
        trained = " (trained against)" if row.trained else ""
        yield f"Attack: {ATTACKS.get(row.kind, row.kind)}{trained}", *cells(row.below), f"evaluator.attacks.kinds.{place}.below"


def _cost_rows(report: Report) -> Iterator[FigureRow]:
    times, tokens = report.time.per_verdict, report.evaluator.cost
    for who, name in COSTS.items():
        read = None if tokens is None else tokens_by(tokens, who)
        seconds = None if times is None else seconds_by(times, who)
        yield f"Seconds per verdict, {name}", *cells(seconds, as_percent=False), ""
        yield f"Tokens read per verdict, {name}", *cells(None if read is None else read.tokens_read, as_percent=False), ""
        yield f"Tokens written per verdict, {name}", *cells(None if read is None else read.tokens_written, as_percent=False), ""
    if tokens is not None:
        yield _plain_row("Pairs with counted tokens", count(tokens.pairs))
    if times is not None:
        yield _plain_row("Timed pairs", count(times.pairs))
        yield "Judge time / evaluator time", *cells(times.judge_over_evaluator, as_percent=False), ""
        yield f"Judge time / time of {COSTS['scoring']}", *cells(times.judge_over_scoring, as_percent=False), ""


def _temperature(evaluator: Evaluator) -> str:
    pairs = evaluator.temperature_pairs
    fitted = f" (fitted on {count(pairs)} pairs)" if pairs else " (not fitted: too few held-out pairs)"
    return number(evaluator.temperature) + fitted


def _baselines(report: Report) -> View:
    evaluator = report.evaluator
    labels = evaluator.baselines_on
    own = defined(evaluator.accuracy_gold if labels == "gold" else evaluator.accuracy_judge)
    bars = [] if own is None else [_bar("the evaluator", own, accent=True)]
    bars += [_bar(BASELINE_NAMES[key], figure) for key, figure in baseline_figures(report).items() if figure is not None]
    whose = "Gold labels" if labels == "gold" else f"Labels: {labels_of_pairs(report)} choices"
    label = "Accuracy of the evaluator and its baselines"
    picture = bar_chart(bars, label=label, reference=0.5) if bars else ""
    return {
        "title": "Comparison with baselines",
        "caption": f"{whose}, the same pairs for all; whiskers are intervals, the dashed line is chance level. "
        "Overlapping whiskers do not show whether a difference is significant; see the paired differences in the table.",
        "picture": Markup(picture),
        "field": "evaluator.baselines",
    }


def _risk(evaluator: Evaluator) -> View:
    points = list(evaluator.risk_coverage)
    caption = "Read from right to left: the more pairs the evaluator abstains on, the fewer errors it should make."
    if points:
        coverage, risk = min(points, key=lambda point: (abs(point[0] - 0.8), point[0]))
        caption += f" At a coverage of {percent(coverage)}, its error rate is {percent(risk)}."
    return {
        "title": "Risk over coverage",
        "caption": caption,
        "picture": Markup(risk_coverage_chart(points) if points else ""),
        "field": "evaluator.risk_coverage",
    }


def _calibration(evaluator: Evaluator) -> View:
    bins = [Bin(entry.confidence, entry.accuracy, entry.n) for entry in evaluator.calibration if entry.n]
    return {
        "title": "Calibration",
        "caption": "On the dashed diagonal a confidence of 80% is right 80% of the time; below it the evaluator is "
        "overconfident, above it underconfident. Larger dots represent more pairs.",
        "picture": Markup(reliability_chart(bins) if bins else ""),
        "field": "evaluator.calibration",
    }


def _labels(labels: HumanLabels | None) -> View | None:
    if labels is None:
        return None
    threshold = labels.threshold
    rows = [
        ("Evaluator agrees with people", *cells(labels.evaluator), ""),
        ("Judge agrees with people, readable verdicts", *cells(labels.judge), ""),
        ("Judge agrees with people, kept verdicts", *cells(labels.judge_kept), ""),
        ("Agreement between people (kappa or alpha)", *cells(labels.kappa, as_percent=False), ""),
        *(
            (name, count(value), "", "", "")
            for name, value in (
                ("Judged test pairs", labels.pairs),
                ("Labelled pairs", labels.labelled),
                ("Pairs with a preference", labels.decided),
                ("Pairs called a tie", labels.ties),
                ("Pairs that everybody skipped", labels.skipped),
                ("People", labels.raters),
                ("Labels", labels.labels),
                ("Further pairs that halve the evaluator's interval", labels.more_labels),
                ("Labels of other texts or pairs", labels.unused),
                ("Labels for training, which count in no figure", labels.for_training),
            )
        ),
        ("Wanted error rate where the evaluator is sure", percent(threshold.error), "", "", ""),
        ("Maximum probability of a higher error rate", percent(threshold.delta), "", "", ""),
        ("Threshold of the evaluator", NOT_MEASURED if threshold.sure is None else f"{threshold.sure:g}", "", "", ""),
        ("Error rate at or above it", *cells(threshold.risk), ""),
        ("Upper bound of that error rate", NOT_MEASURED if threshold.bound is None else percent(threshold.bound), "", "", ""),
        ("Share of pairs at or above it", *cells(threshold.coverage), ""),
        ("Uniformly drawn pairs that the threshold rests on", count(threshold.pairs), "", "", ""),
        ("Pairs at or above it", count(threshold.selected), "", "", ""),
        ("Fewest such pairs for a threshold", count(threshold.needed), "", "", ""),
    ]
    return {"rows": rows, "sentences": label_sentences(labels)}


def _verdicts(verdicts: Verdicts, *, people: bool) -> View:
    parts = [
        Part("kept", verdicts.kept, "p1"),
        Part("tie", verdicts.tie, "p3"),
        Part("unsure", verdicts.unsure, "p2"),
        Part("unparsable", verdicts.unparsable, "p4"),
    ]
    return {
        "judged": count(verdicts.judged),
        "stack": _stack(parts, "Verdicts by state", "verdicts"),
        "meanings": MEANINGS,
        "rows": [
            ("Share of verdicts kept", *cells(verdicts.kept_share), "verdicts.kept_share"),
            *(row for name, field, as_percent in _VERDICT_FIGURES for row in _measured(name, verdicts, field, as_percent)),
            *(row for place, member in enumerate(verdicts.members or ()) for row in _member_rows(member, place)),
            *_judge_calibration_rows(verdicts.calibration),
            (
                f"Kept labels that agree with {'people' if people else 'gold'}",
                *cells(verdicts.label_accuracy_gold),
                "verdicts.label_accuracy_gold",
            ),
            *(
                _plain_row(f"Outputs of the judge {CAUSES[cause]}", count(n), field=f"verdicts.unreadable_orders.{cause}")
                for cause, n in verdicts.unreadable_orders
                if n
            ),
            *_probe_rows(verdicts.probe),
        ],
        "findings": [] if verdicts.probe is None else [(f.observation, f.remedy) for f in verdicts.probe.findings],
    }


_VERDICT_FIGURES = (
    ("Same choice (one, other, neither) when the order is swapped", "swap_consistency", True),
    ("Share of the votes for the most frequent answer", "majority_share", True),
    ("Entropy of the sampled votes, in nats", "vote_entropy", False),
    ("Mean grade of the replies, on the scale of the rubric", "mean_grade", False),
)
"""Figures of the verdicts that depend on the judge: name, field, and whether they are shares."""


def _member_rows(member: JudgeMember, place: int) -> list[FigureRow]:
    name, path = f"Judge {member.judge}", f"verdicts.members.{place}"
    return [
        _plain_row(f"{name}: accuracy of its votes, estimated from agreement", percent(member.accuracy)),
        *_measured(f"{name}: share of the pairs on which it voted", member, "voted", path=path),
        *_measured(f"{name}: votes of the other judges that agree with its own", member, "agreement", path=path),
    ]


def _judge_calibration_rows(found: JudgeCalibration | None) -> list[FigureRow]:
    if found is None:
        return []
    return [
        *_signal_rows(found.signals),
        _plain_row("Calibration: factor of the log-odds of a verdict", f"{found.slope:.3f}"),
        _plain_row("Calibration: the same after an output that was cut off", f"{found.truncated_slope:.3f}"),
        _plain_row("Calibration: log-odds in favour of the reply shown first, subtracted", f"{found.bias:+.3f}"),
    ]


def _signal_rows(found: JudgeSignals | None) -> list[FigureRow]:
    if found is None:
        return []
    rows = [_plain_row(f"Calibration: weight of {name}", f"{getattr(found, field):+.3f}") for name, field in _SIGNALS]
    return [
        *rows,
        *([_plain_row("Calibration: points of the isotonic regression", count(len(found.steps)))] if found.steps else []),
    ]


_SIGNALS = (
    ("swap agreement", "agreement"),
    ("the margin, per unit of log-odds", "margin"),
    ("the entropy of the votes, per nat", "entropy"),
    ("disagreement between judges", "disagreement"),
    ("the margin of an output that was cut off, in addition", "truncated"),
)
"""Signals of a verdict: name, field."""


def _probe_rows(probe: JudgeProbe | None) -> list[FigureRow]:
    if probe is None:
        return []
    whose, path = f"First {count(probe.pairs)} pairs", "verdicts.probe"
    return [
        *_measured(f"{whose}: same choice when the order is swapped", probe, "agreement", path=path),
        *_measured(f"{whose}: orders that chose the reply shown first", probe, "shown_first", path=path),
        *_measured(f"{whose}: probability of the verdict labels", probe, "label_mass", path=path),
    ]


def _measured(
    name: str,
    part: Verdicts | JudgeMember | JudgeProbe,
    field: str,
    as_percent: bool = True,
    *,
    path: str = "verdicts",
) -> list[FigureRow]:
    """Return a row, or none for a figure without cases: a judge that does not compare in both orders has no consistency."""
    figure: Figure | None = getattr(part, field)
    return [(name, *cells(figure, as_percent=as_percent), f"{path}.{field}")] if figure is not None and figure.n else []


def _replies(replies: Replies) -> list[FigureRow]:
    return [
        ("Replies cut off at the token limit", *cells(replies.unfinished), "replies.unfinished"),
        ("The same before training", *cells(replies.unfinished_before), "replies.unfinished_before"),
        ("The same after training", *cells(replies.unfinished_after), "replies.unfinished_after"),
        _plain_row("Token limit", count(replies.limit)),
        *_same_question_rows(replies.per_question),
        *_unit_tests(replies.unit_tests),
    ]


def _same_question_rows(found: RepliesPerQuestion | None) -> Iterator[FigureRow]:
    for field, name in SAME_QUESTION.items() if found else ():
        as_percent = field == "identical"
        yield (
            f"Replies to the same question: {name}",
            *cells(getattr(found, field), as_percent=as_percent),
            f"replies.per_question.{field}",
        )


_RESULTS = {
    "passed": "all tests passed",
    "failed": "a test failed",
    "error": "an exception other than a failed assertion",
    "syntax": "the code does not compile",
    "timeout": "out of time",
    "memory": "out of memory",
    "exit": "the process was ended before the last test",
    "crash": "the process was ended by a signal",
    "no_code": "no code in the reply",
}
"""Results of unit tests, by their name in `UnitTests`."""


def _unit_tests(tests: UnitTests | None) -> list[FigureRow]:
    """Return the number of replies with each result; none without unit tests."""
    if tests is None:
        return []
    found = [(said, getattr(tests, name)) for name, said in _RESULTS.items()]
    rows = [_plain_row(f"Unit tests: {said}", count(n), count(tests.n)) for said, n in found if n]
    return [_plain_row("Replies whose code was tested", count(tests.n)), *rows]


def _samples(samples: Sequence[Sample]) -> View:
    views = [_sample(sample, f"samples.{place}", sample_anchor(place)) for place, sample in enumerate(samples)]
    by_gold = any(sample.gold_before is not None or sample.gold_after is not None for sample in samples)
    return {"open": views[:SAMPLES_OPEN], "more": views[SAMPLES_OPEN:], "by_gold": by_gold}


def _sample(sample: Sample, field: str, anchor: str) -> View:
    sides = [
        _side("Before", sample.before, sample.gold_before, sample.evaluator_before),
        _side("After", sample.after, sample.gold_after, sample.evaluator_after),
    ]
    outcome = {
        "win": "the judge prefers the new reply",
        "tie": "a tie",
        "loss": "the judge prefers the old reply",
        "unparsable": "the judge's answer could not be read",
    }[sample.verdict]
    return {"question": sample.question, "sides": sides, "verdict": outcome, "field": field, "anchor": anchor}


def _side(title: str, text: str, gold: bool | None, score: float) -> View:
    return {"title": title, "text": text, "gold": gold, "score": f"{score:+.2f}"}


def _dropped(dropped: Dropped) -> View:
    rows = [
        (stage, reason.replace("_", " "), count(amount), f"dropped.{stage}.{reason}")
        for stage, reasons in (("questions", dropped.questions), ("replies", dropped.replies), ("verdicts", dropped.verdicts))
        for reason, amount in reasons.items()
    ]
    examples = [(drop.stage, drop.reason.replace("_", " "), drop.text) for drop in dropped.examples]
    return {"rows": rows, "examples": examples}


_PROMPTS_READ = {True: "read once for all replies", False: "read with each reply", None: ""}


def _cost(report: Report) -> View:
    times, memory = report.time.stages, report.memory
    styles = [STAGE_STYLES[order % len(STAGE_STYLES)] for order in range(len(times))]
    parts = [Part(name, seconds, style) for (name, seconds), style in zip(times.items(), styles, strict=True)]
    whole = sum(times.values())
    return {
        "total": duration(report.time.total),
        "picture": Markup(stacked_bar(parts, label="Time by stage") if whole > 0 else ""),
        "stages": [(p.name, p.style, duration(p.amount), percent(p.amount / whole) if whole else "") for p in parts],
        "memory": [
            ("Base weights", format_bytes(memory.base_bytes)),
            ("Adapters and heads", format_bytes(memory.adapter_bytes)),
            ("Peak", format_bytes(memory.peak_bytes)),
            ("Copies of the base weights", count(memory.weight_copies)),
            ("Prompts in scoring and training", _PROMPTS_READ[memory.shared_prompts]),
            *memory_rows(memory),
        ],
        "servers": [(f"{who}: {name}", amount) for who, name, amount in server_rows(report.servers or ())],
    }


def config_tables(config: Mapping[str, Any]) -> list[View]:
    """Return the resolved configuration, one table per section; top-level values form the first table."""
    alone = {key: value for key, value in config.items() if not isinstance(value, dict)}
    nested = [(key, value) for key, value in config.items() if isinstance(value, dict)]
    tables = ([("run", alone)] if alone else []) + nested
    return [{"title": title, "rows": list(flat(values))} for title, values in tables]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys and values of a nested configuration, as text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
