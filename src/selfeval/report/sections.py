"""What each section of the page shows: the report and the metrics in, plain data and finished charts out.

Each function answers for one section and names what was not measured; the template only lays the answers out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from selfeval.errors import InputError
from selfeval.report.charts import Bar, Bin, Line, Mark, Part, Track
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
    Figure,
    cells,
    count,
    describe,
    describe_difference,
    difference_cells,
    duration,
    finite,
    number,
    percent,
    read_comparison,
    read_figure,
    section,
    size,
    tested,
)
from selfeval.report.memory import memory_rows
from selfeval.report.summary import (
    BASELINE_NAMES,
    COSTS,
    badges,
    baseline_labels,
    evaluator_accuracy,
    rounds_of,
    rounds_sentences,
    strongest_baseline,
    verdict_sentences,
)

__all__ = ["all_sections", "column"]

View = dict[str, Any]
Rows = Sequence[dict[str, Any]]

SMOOTHING = 0.25
SMOOTH_FROM = 20
SAMPLES_OPEN = 6

CURVES = (
    ("Reward", "What the policy is trained on: the evaluator's score less the price of leaving the reference.",
     (("reward", "reward"), ("score", "score"))),
    ("KL to the reference", "Nats per reply. How far the policy has walked from where it began.", (("kl", "KL"),)),
    ("Reply length", "Tokens per reply. A steady climb would mean that length is being rewarded.",
     (("length", "length"),)),
    ("Entropy", "Nats per token. A fall to zero means that the policy has stopped exploring.",
     (("entropy", "entropy"),)),
    ("Policy loss", "The clipped surrogate. It hovers about zero by design; look for jumps.",
     (("policy_loss", "policy loss"),)),
    ("Value loss", "How far the critic's forecast is from the return it saw.", (("value_loss", "value loss"),)),
    ("Explained variance", "Of the returns, by the critic. One is perfect; below zero is worse than a constant.",
     (("explained_variance", "explained variance"),)),
    ("Clip fraction", "Share of tokens whose ratio was clipped. High means that steps are too large.",
     (("clip_fraction", "clip fraction"),)),
)  # fmt: skip
MORE_CURVES = (
    ("KL coefficient", "The price of one nat.", (("kl_coefficient", "KL coefficient"),)),
    ("Approximate KL", "Between the policy before and after one update.", (("approximate_kl", "approximate KL"),)),
    ("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),)),
    ("Seconds per step", "Rollout, scoring and update together.", (("seconds", "seconds"),)),
)  # fmt: skip
WHOSE = ("Evaluator", "Policy")
GOLD = (("evaluator.accuracy_gold",), ("policy.gold_before", "policy.gold_after"))
WIN_RATES = (
    ("win_rate", "ties count half"),
    ("win_rate_decisive", "ties dropped"),
    ("length_controlled", "length controlled"),
)
ACCURACIES = (
    ("accuracy_gold", "Accuracy on held-out pairs, gold labels"),
    ("accuracy_judge", "Accuracy on the pairs the judge was sure of"),
)
CALIBRATION = (
    ("ece", "Expected calibration error"),
    ("brier", "Brier score"),
)
COST = (
    ("time.per_verdict.{}", "Seconds"),
    ("evaluator.cost.{}.tokens_read", "Tokens read"),
    ("evaluator.cost.{}.tokens_written", "Tokens written"),
)
MEMORY = (
    ("base_bytes", "Base weights"),
    ("adapter_bytes", "Adapters and heads"),
    ("peak_bytes", "Peak"),
)
STAGE_STYLES = ("p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8")
STATES = (
    ("kept", "kept", "p1", "The judge was sure, in both orders: these train the evaluator."),
    ("tie", "tie", "p3", "The judge found both replies equally good."),
    ("unsure", "unsure", "p2", "The judge changed its mind with the order, or was not confident enough."),
    ("unparsable", "unparsable", "p4", "The judge's answer could not be read: a state of its own, never a default."),
)


def all_sections(report: dict[str, Any], metrics: dict[str, list[dict[str, Any]]]) -> View:
    """Return everything the template needs, one entry per section.

    Args:
        report: the report of a run, schema 1.
        metrics: the rows of each `metrics/<stage>.jsonl`, by stage; stages may be absent.

    Raises:
        InputError: a part of the report does not have the shape that schema 1 gives it.
    """
    return {
        "head": _head(report),
        "verdict": _verdict(report),
        "headline": [_headline_evaluator(report), _headline_gold(report), _headline_wins(report)],
        "rounds": _rounds(report),
        "policy": _policy(report),
        "curves": _curves(report, metrics),
        "evaluator": _evaluator(report, metrics.get("evaluator", [])),
        "verdicts": _verdicts(report),
        "samples": _samples(report),
        "dropped": _dropped(report),
        "cost": _cost(report),
        "data": [(name.replace("_", " "), count(value)) for name, value in section(report, "data").items()],
        "config": _config(report),
        "prompts": [(name, str(text)) for name, text in section(report, "prompts").items() if text],
        "versions": [(name, str(value)) for name, value in section(report, "versions").items()],
    }


def column(rows: Rows, key: str) -> tuple[list[tuple[float, float]], int]:
    """Return the (step, value) points of one metric, and how many values were there but not finite.

    >>> column([{"step": 1, "kl": 0.5}, {"step": 2}, {"step": 3, "kl": float("nan")}], "kl")
    ([(1.0, 0.5)], 1)
    """
    points, broken = [], 0
    for order, row in enumerate(rows, start=1):
        step, value = finite(row.get("step", order)), finite(row.get(key))
        if step is not None and value is not None:
            points.append((step, value))
        elif isinstance(row.get(key), float):
            broken += 1
    return points, broken


def _head(report: dict[str, Any]) -> View:
    model, seconds = section(report, "model"), finite(section(report, "time").get("total"))
    facts = [("model", str(model["name"]))] if model.get("name") else []
    if model.get("model_type"):
        facts.append(("architecture", str(model["model_type"])))
    if finite(model.get("parameters")) is not None:
        facts.append(("parameters", count(model["parameters"])))
    if "domain" in model:
        facts.append(("domain", str(model["domain"] or "your own questions, no gold")))
    if report.get("seed") is not None:
        facts.append(("random seed", str(report["seed"])))
    if seconds is not None:
        facts.append(("time", duration(seconds)))
    return {"name": str(report.get("name") or "unnamed run"), "facts": facts}


def _verdict(report: dict[str, Any]) -> list[View]:
    findings = []
    for who, gold, text, badge in zip(WHOSE, GOLD, verdict_sentences(report), badges(report), strict=True):
        by_judge = badge.standing != "unmeasured" and any(read_figure(report, path) is None for path in gold)
        word = f"{badge.word}, by judge" if by_judge else badge.word
        told = text.replace("n = ", "n\u00a0=\u00a0").replace("p = ", "p\u00a0=\u00a0")
        findings.append({"whose": who, "text": told, "standing": badge.standing, "word": word})
    return findings


def _headline(title: str, value: str, under: str, picture: str = "") -> View:
    return {"title": title, "value": value, "under": under, "picture": Markup(picture)}


def _interval(figure: Figure) -> str:
    if figure.ci_low is None or figure.ci_high is None:
        return f"no interval, n = {count(figure.n)}"
    return f"interval {percent(figure.ci_low)} to {percent(figure.ci_high)}, n = {count(figure.n)}"


_TRACK_NAMES = dict(zip(BASELINE_NAMES.values(), ("judge", "log-prob", "longer", "first"), strict=True))
"""Baselines by the short name that fits beside their interval on the card."""


def _headline_evaluator(report: dict[str, Any]) -> View:
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
    return _headline(title, percent(figure.value), _interval(figure), picture)


def _headline_gold(report: dict[str, Any]) -> View:
    before, after = read_figure(report, "policy.gold_before"), read_figure(report, "policy.gold_after")
    title = "Right by gold, before and after"
    if before is None or after is None:
        return _headline(title, "–", "no gold was measured both before and after")
    tracks = [_track("before", before), _track("after", after, accent=True)]
    picture = interval_tracks(tracks, label=f"Before {describe(before)}; after {describe(after)}")
    gain = read_comparison(report, "policy.comparisons.gold")
    under = f"after: {_interval(after)}" if gain is None else f"by {describe_difference(gain)}"
    return _headline(title, f"{percent(before.value)} → {percent(after.value)}", under, picture)


def _headline_wins(report: dict[str, Any]) -> View:
    wins = read_figure(report, "policy.win_rate")
    if wins is None:
        return _headline("Win rate, after against before", "–", NOT_MEASURED)
    tracks = [_track("win rate", wins, accent=True)]
    decisive = read_figure(report, "policy.win_rate_decisive")
    if decisive is not None:
        tracks.append(_track("without ties", decisive))
    picture = interval_tracks(tracks, label=f"Win rate {describe(wins)}", reference=0.5)
    return _headline("Win rate, after against before", percent(wins.value), _interval(wins), picture)


def _track(name: str, figure: Figure, *, accent: bool = False) -> Track:
    return Track(name, figure.value, figure.ci_low, figure.ci_high, accent)


def _bar(name: str, figure: Figure, *, accent: bool = False) -> Bar:
    return Bar(name, figure.value, figure.ci_low, figure.ci_high, f"{percent(figure.value)}, n = {figure.n:,}", accent)


def _policy(report: dict[str, Any]) -> View:
    policy = section(report, "policy")
    wins = [(name, read_figure(report, f"policy.{key}")) for key, name in WIN_RATES]
    bars = [_bar(name, figure, accent=True) for name, figure in wins if figure is not None]
    chart = bar_chart(bars, label="Win rate of the new policy against the old", reference=0.5) if bars else ""
    rows = [
        ("Right by gold, before", *cells(read_figure(report, "policy.gold_before"))),
        ("Right by gold, after", *cells(read_figure(report, "policy.gold_after"))),
        _difference_row("Right by gold, after less before", report, "policy.comparisons.gold"),
        *((f"Win rate, {name}", *cells(figure)) for name, figure in wins),
        _difference_row("Win rate less one half", report, "policy.comparisons.win_rate"),
        ("KL to the reference, nats per reply", *cells(read_figure(report, "policy.kl"), as_percent=False)),
        ("Reply length, after over before", *cells(read_figure(report, "policy.length_ratio"), as_percent=False)),
    ]
    outcomes = (("win", "p1"), ("tie", "p3"), ("loss", "p2"), ("unparsable", "p4"))
    parts = [Part(name, finite(policy.get(name)) or 0.0, style) for name, style in outcomes]
    return {
        "wins": Markup(chart),
        "rows": rows,
        "outcomes": _stack(parts, "Comparisons of the new policy's reply with the old one's"),
        "watchdogs": _objects(policy, "watchdogs", "policy.watchdogs"),
    }


def _difference_row(name: str, report: dict[str, Any], path: str) -> tuple[str, str, str, str]:
    """A paired difference as a row of a table of figures, with its test in the name."""
    comparison = read_comparison(report, path)
    if comparison is None:
        return name, *difference_cells(None)
    told = f"{name} ({comparison.wins:,} won, {comparison.losses:,} lost, {tested(comparison)})"
    return told, *difference_cells(comparison)


def _rounds(report: dict[str, Any]) -> View:
    """Evaluator and policy of every round; nothing to show for a run of one round."""
    rows = rounds_of(report)
    by_gold = bool(rows) and read_figure(rows[0], "evaluator.accuracy_gold_first_pairs") is not None
    labels, after = ("gold", "gold_after") if by_gold else ("judge", "win_rate")
    evaluators = _by_round(rows, f"evaluator.accuracy_{labels}_first_pairs")
    policies = _by_round(rows, f"policy.{after}")
    start = read_figure(rows[0], "policy.gold_before") if by_gold else None
    if start is not None:
        policies = {0: start, **policies}
    words = "Share right by gold; round 0 is the base." if start else "Win rate over the round before, by the judge."
    return {
        "told": rounds_sentences(report),
        "labels": labels,
        "pictures": [
            _round_chart("Evaluators on round 1's pairs", f"Accuracy, by {labels}; the band is the interval.", evaluators),
            _round_chart("Policies on the test questions", words, policies),
        ],
        "rows": [_round_row(row, labels) for row in rows],
    }


def _by_round(rows: Rows, path: str) -> dict[int, Figure]:
    """The figure at this path of every round that has it."""
    found = {row["round"]: read_figure(row, path) for row in rows}
    return {number: figure for number, figure in found.items() if figure is not None}


def _round_chart(title: str, told: str, figures: dict[int, Figure]) -> View:
    points = [(float(number), figure.value) for number, figure in figures.items()]
    ends = [(f.ci_low, f.ci_high) for f in figures.values()]
    band = [(low, high) for low, high in ends if low is not None and high is not None]
    line = Line("share", points, band=band if len(band) == len(points) else None)
    picture = line_chart([line], label=title, x_label="round", percent_axes="y") if points else ""
    return {"title": title, "told": told, "picture": Markup(picture)}


def _round_row(row: dict[str, Any], labels: str) -> View:
    """A round's cells in the two tables: each figure as value, interval and n."""
    evaluator, policy = section(row, "evaluator"), section(row, "policy")
    shares = (f"accuracy_{labels}_first_pairs", "accuracy_gold", "accuracy_judge")
    return {
        "round": row["round"],
        "evaluator": [cells(read_figure(row, f"evaluator.{name}")) for name in shares],
        "pairs": count(evaluator.get("pairs_trained")),
        "policy": [
            *(cells(read_figure(row, f"policy.{name}")) for name in ("win_rate", "gold_before", "gold_after")),
            cells(read_figure(row, "policy.kl"), as_percent=False),
        ],
        "outcomes": " / ".join(count(policy.get(name)) for name in ("win", "tie", "loss")),
    }


def _stack(parts: Sequence[Part], label: str) -> View | None:
    """A stacked bar and the rows of its table, or None when there is nothing to stack."""
    whole = sum(part.amount for part in parts)
    if whole <= 0:
        return None
    rows = [(part.name, part.style, count(part.amount), percent(part.amount / whole)) for part in parts]
    return {"picture": Markup(stacked_bar(parts, label=label)), "rows": rows}


def _objects(holder: dict[str, Any], key: str, path: str) -> list[View] | None:
    """The list of objects under `key`, or None when it was not recorded."""
    found = holder.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"report.json: {path!r} should be a list of objects")
    return found


def _curves(report: dict[str, Any], metrics: dict[str, list[dict[str, Any]]]) -> View:
    rows = metrics.get("policy", [])
    alarms = _objects(section(report, "policy"), "watchdogs", "policy.watchdogs") or []
    seen = [(finite(alarm.get("seen_at", alarm.get("step"))), alarm) for alarm in alarms]
    marks = [Mark(step, _alarm(alarm)) for step, alarm in seen if step is not None]
    shown = [_curve(rows, title, told, keys, marks) for title, told, keys in CURVES]
    known = {"step"} | {key for _, _, keys in (*CURVES, *MORE_CURVES) for key, _ in keys}
    unknown = sorted({key for row in rows for key in row if finite(row[key]) is not None} - known)
    others = [(key.replace("_", " ").capitalize(), "", ((key, key),)) for key in unknown]
    more = [_curve(rows, title, told, keys, marks) for title, told, keys in (*MORE_CURVES, *others)]
    by_gold = [_gold_curve(metrics.get("evaluation", []), marks), _overoptimisation(report)]
    return {"shown": [*by_gold, *shown], "more": more, "measured": bool(rows)}


def _overoptimisation(report: dict[str, Any]) -> View:
    """What the evaluator promised and what gold gave, over how far the policy went; measured where there is gold."""
    found = section(report, "policy").get("overoptimisation") or {}
    raw = _rows_of_numbers(found.get("points") or [], 3)
    told = "Nothing to draw: no gold, or too few iterations."
    if not raw:
        return {"title": "Promise and gold", "told": told, "picture": ""}
    lines = [Line(name, sorted((row[0], row[place]) for row in raw)) for name, place in (("evaluator", 1), ("gold", 2))]
    start, fits = found.get("start") or [0.0, 0.0], found.get("fit") or {}
    xs = sorted({x for line in lines for x, _ in line.points})
    for (key, fit), base in zip(fits.items(), start, strict=True):
        # At the start the distance is 0, where x log x is 0 and log x is not defined.
        gains = [(x, x * (fit["alpha"] - fit["beta"] * math.log(x)) if x > 0 else 0.0) for x in _between(xs[0], xs[-1])]
        curve = [(x, base + gain) for x, gain in gains]
        lines.append(Line(f"{key}, fitted", curve))
    gap = read_figure(report, "policy.overoptimisation.gap")
    told = (
        "Share right by gold, and the share that the evaluator's scores promise, over the square root of the KL to the start "
        f"(Gao et al. 2022). Promised beyond gold in the last quarter: {describe(gap)}."
    )
    picture = line_chart(lines, label="Promise and gold", x_label="square root of the KL", percent_axes="y", whole_x=False)
    return {"title": "Promise and gold", "told": told, "picture": Markup(picture)}


def _between(low: float, high: float, steps: int = 40) -> list[float]:
    return [low + (high - low) * k / steps for k in range(steps + 1)]


def _rows_of_numbers(raw: object, width: int) -> list[list[float]]:
    if not isinstance(raw, list) or not all(isinstance(row, list) and len(row) == width for row in raw):
        raise InputError(f"report.json: 'policy.overoptimisation.points' should be a list of rows of {width} numbers")
    return [[float(x) for x in row] for row in raw if all(finite(x) is not None for x in row)]


def _alarm(alarm: dict[str, Any]) -> str:
    return f"step {alarm.get('step')}, {alarm.get('name', 'watchdog')}: {alarm.get('message', '')}"


def _curve(
    rows: Rows, title: str, told: str, keys: Sequence[tuple[str, str]], marks: Sequence[Mark] = (), shares: str = ""
) -> View:
    """One chart of metrics, or the sentence that says it was not measured."""
    lines, broken = [], 0
    for key, name in keys:
        points, missing = column(rows, key)
        broken += missing
        if points:
            lines.append(Line(name, points, smoothing=SMOOTHING if len(points) >= SMOOTH_FROM else 0.0))
    picture = line_chart(lines, label=title, marks=marks, percent_axes=shares) if lines else ""
    if broken:
        told = f"{told} {broken} value{'s were' if broken > 1 else ' was'} not finite and cannot be drawn."
    return {"title": title, "told": told.strip(), "picture": Markup(picture)}


def _gold_curve(rows: Rows, marks: Sequence[Mark]) -> View:
    told = "Share of replies that are right by gold, which training never sees."
    cases = sorted({int(n) for row in rows if (n := finite(row.get("n"))) is not None})
    if cases:
        told += f" n = {cases[0]:,}" + (f" to {cases[-1]:,}" if cases[-1] > cases[0] else "") + " per point."
    return _curve(rows, "Gold over training", told, (("gold", "gold"),), marks, shares="y")


def _evaluator(report: dict[str, Any], rows: Rows) -> View:
    evaluator = section(report, "evaluator")
    table = [(name, *cells(read_figure(report, f"evaluator.{key}"))) for key, name in ACCURACIES]
    table += [(name, *cells(read_figure(report, f"evaluator.{key}"), as_percent=False)) for key, name in CALIBRATION]
    table += [
        _difference_row(f"Accuracy less {name}, same pairs", report, f"evaluator.comparisons.{key}")
        for key, name in (*BASELINE_NAMES.items(), ("chance", "one half"))
    ]
    table += [
        (f"{name} per verdict, {whose}", *cells(read_figure(report, path.format(who)), as_percent=False))
        for who, whose in COSTS.items()
        for path, name in COST
    ]
    table.append(("Temperature of the scores", _temperature(evaluator), "", ""))
    table.append(("Pairs trained on", count(evaluator.get("pairs_trained")), "", ""))
    return {
        "rows": table,
        "baselines": _baselines(report),
        "risk": _risk(evaluator),
        "calibration": _calibration(evaluator),
        "training": [
            _curve(rows, "Evaluator loss", "Bradley-Terry loss on the pairs it trains on.", (("loss", "loss"),)),
            _curve(
                rows,
                "Evaluator accuracy while training",
                "On each batch of training pairs, before its update.",
                (("accuracy", "batch"),),
                shares="y",
            ),
        ],
    }


def _temperature(evaluator: dict[str, Any]) -> str:
    value = finite(evaluator.get("temperature"))
    if value is None:
        return NOT_MEASURED
    return number(value) + (" (not fitted: too few held-out pairs)" if evaluator.get("temperature_pairs") == 0 else "")


def _baselines(report: dict[str, Any]) -> View:
    labels = baseline_labels(report)
    own = read_figure(report, f"evaluator.accuracy_{labels}")
    bars = [] if own is None else [_bar("the evaluator", own, accent=True)]
    for key, name in BASELINE_NAMES.items():
        figure = read_figure(report, f"evaluator.baselines.{key}")
        if figure is not None:
            bars.append(_bar(name, figure))
    told = "Gold labels" if labels == "gold" else "The judge's own labels, on which it is right by construction"
    label = "Accuracy of the evaluator and its baselines"
    picture = bar_chart(bars, label=label, reference=0.5) if bars else ""
    return {
        "title": "Against its baselines",
        "told": f"{told}, the same pairs for all; whiskers are intervals, the dashed line is a tossed coin. "
        "Whiskers that overlap say nothing about a difference on the same pairs; the table has the paired differences.",
        "picture": Markup(picture),
    }


def _risk(evaluator: dict[str, Any]) -> View:
    raw = evaluator.get("risk_coverage") or []
    if not isinstance(raw, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in raw):
        raise InputError("report.json: 'evaluator.risk_coverage' should be a list of pairs, coverage and risk")
    points = [(c, r) for pair in raw if (c := finite(pair[0])) is not None and (r := finite(pair[1])) is not None]
    told = "Read it from right to left: the more the evaluator may stay silent, the less it should be wrong."
    if points:
        coverage, risk = min(points, key=lambda point: (abs(point[0] - 0.8), point[0]))
        told += f" Answering {percent(coverage)} of pairs, it errs on {percent(risk)} of those."
    return {
        "title": "Risk over coverage",
        "told": told,
        "picture": Markup(risk_coverage_chart(points) if points else ""),
    }


def _calibration(evaluator: dict[str, Any]) -> View:
    bins = []
    for entry in _objects(evaluator, "calibration", "evaluator.calibration") or []:
        sure, right, cases = (finite(entry.get(key)) for key in ("confidence", "accuracy", "n"))
        if sure is not None and right is not None and cases:
            bins.append(Bin(sure, right, int(cases)))
    return {
        "title": "Right as often as it says",
        "told": "On the dashed diagonal a confidence of 80% is right 80% of the time; below it the evaluator is too "
        "sure of itself, above it too modest. Larger dots hold more pairs.",
        "picture": Markup(reliability_chart(bins) if bins else ""),
    }


def _verdicts(report: dict[str, Any]) -> View:
    verdicts = section(report, "verdicts")
    parts = [Part(name, finite(verdicts.get(key)) or 0.0, style) for key, name, style, _ in STATES]
    named = (
        ("kept_share", "Share of verdicts kept"),
        ("swap_consistency", "Same choice (one, other, neither) when the order is swapped"),
        ("label_accuracy_gold", "Kept labels that agree with gold"),
    )
    return {
        "judged": count(verdicts.get("judged")),
        "stack": _stack(parts, "What became of the verdicts"),
        "told": {name: told for _, name, _, told in STATES},
        "rows": [(name, *cells(read_figure(report, f"verdicts.{key}"))) for key, name in named],
    }


def _samples(report: dict[str, Any]) -> View:
    samples = [_sample(raw) for raw in _objects(report, "samples", "samples") or []]
    by_gold = any(side["gold"] is not None for sample in samples for side in sample["sides"])
    return {"open": samples[:SAMPLES_OPEN], "more": samples[SAMPLES_OPEN:], "by_gold": by_gold}


def _sample(raw: dict[str, Any]) -> View:
    sides = [
        {
            "title": title,
            "text": str(raw.get(key, "")),
            "gold": raw.get(f"gold_{key}"),
            "score": None if (score := finite(raw.get(f"evaluator_{key}"))) is None else f"{score:+.2f}",
        }
        for key, title in (("before", "Before"), ("after", "After"))
    ]
    words = {"win": "the judge prefers the new reply", "tie": "a tie", "loss": "the judge prefers the old reply"}
    verdict = str(raw.get("verdict") or "")
    told = words.get(verdict, verdict or "not judged")
    return {"question": str(raw.get("question", "")), "sides": sides, "verdict": told}


def _dropped(report: dict[str, Any]) -> View:
    dropped = section(report, "dropped")
    rows = [
        (stage, reason.replace("_", " "), count(amount))
        for stage, reasons in dropped.items()
        if isinstance(reasons, dict)
        for reason, amount in reasons.items()
    ]
    examples = [
        (str(e.get("stage", "")), str(e.get("reason", "")).replace("_", " "), str(e.get("text", "")))
        for e in _objects(dropped, "examples", "dropped.examples") or []
    ]
    return {"rows": rows, "examples": examples, "recorded": bool(dropped)}


def _cost(report: dict[str, Any]) -> View:
    times = {name: known for name, value in section(report, "time").items() if (known := finite(value)) is not None}
    total = times.pop("total", None)
    styles = [STAGE_STYLES[order % len(STAGE_STYLES)] for order in range(len(times))]
    parts = [Part(name, seconds, style) for (name, seconds), style in zip(times.items(), styles, strict=True)]
    whole = sum(times.values())
    memory = section(report, "memory")
    rows = []
    for key, name in MEMORY:
        known = finite(memory.get(key))
        rows.append((name, NOT_MEASURED if known is None else size(known)))
    return {
        "total": NOT_MEASURED if total is None else duration(total),
        "picture": Markup(stacked_bar(parts, label="Time by stage") if whole > 0 else ""),
        "stages": [(p.name, p.style, duration(p.amount), percent(p.amount / whole) if whole else "") for p in parts],
        "memory": [*rows, ("Copies of the base weights", count(memory.get("weight_copies"))), *memory_rows(report)],
    }


def _config(report: dict[str, Any]) -> list[View]:
    """The resolved config, one table per top-level part; plain values at the top stand in a table of their own."""
    config = section(report, "config")
    alone = {key: value for key, value in config.items() if not isinstance(value, dict)}
    nested = [(key, value) for key, value in config.items() if isinstance(value, dict)]
    tables = ([("run", alone)] if alone else []) + nested
    return [{"title": title, "rows": list(_flat(values))} for title, values in tables]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
