"""Tables of a judge's figures on labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfeval.texts import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from selfeval.judge_benchmark.benchmark import JudgeBenchmark
    from selfeval.judge_benchmark.label_calibration import LabelCalibration
    from selfeval.judge_benchmark.label_check import JudgeCheck
    from selfeval.quality.comparisons import Comparison
    from selfeval.quality.statistics import Figure

__all__ = ["print_benchmark", "print_check", "text_table"]

_NAMES = {"longer": "the longer reply", "first": "the first reply", "mean_logprob": "the higher mean log-probability"}
_LEVEL = {**_NAMES, "chance": "chance level"}


def print_benchmark(result: JudgeBenchmark, console: Console | None = None) -> None:
    """Print the figures of a benchmark on one screen."""
    from rich.console import Console

    console = console or Console()
    measured, scores = result.measured, result.measured.scores
    _say(console, f"{_judge_line(result.judge)} on {result.data}: {measured.pairs:,} pairs, {measured.ties:,} of them ties")
    rows: list[tuple[str, Figure | None]] = [
        ("agreement with people, forced to choose", scores.agreement),
        *((f"… on the surest {coverage:.0%} of pairs", figure) for coverage, figure in measured.at_coverage if coverage < 1),
        (f"pairs with a verdict at confidence {result.judge['verdicts']['keep']:g}", scores.coverage),
        ("agreement with people on these", scores.agreement_kept),
        ("both orders choose the same", scores.swap_consistency),
        ("pairs without a readable verdict", scores.unparsable),
        ("agreement with people, ties included", measured.with_ties),
        ("one annotator agrees with another", measured.annotators),
        ("the judge agrees with one annotator", measured.with_annotators),
        *((f"baseline: {_NAMES[name]}", figure) for name, figure in measured.baselines.items()),
    ]
    console.print(_figure_table([(name, figure) for name, figure in rows if figure is not None and figure.n]))
    for name, comparison in measured.comparisons.items():
        _say(console, f"judge minus {_LEVEL[name]}: {_difference(comparison)}")
    if measured.subsets:
        console.print(_subset_table(result))


def print_check(check: JudgeCheck, console: Console | None = None) -> None:
    """Print a judge's figures against human labels, and the setting to use."""
    from rich.console import Console

    console = console or Console()
    found = check.figures
    left_out = f"; {check.unlabelled:,} without a label are left out" if check.unlabelled else ""
    _say(console, f"{_judge_line(check.judge)}: {found.pairs:,} labelled pairs, {found.ties:,} of them ties{left_out}")
    if check.informed:
        _say(
            console,
            f"{check.informed:,} further labelled pairs are left out: they were drawn because the evaluator or the judge is "
            "probably wrong on them, and these figures need a uniform sample",
        )
    shares = [
        ("agreement with people, forced to choose", found.agreement),
        ("both orders choose the same", found.swap_consistency),
        ("orders that choose the reply shown first (50% without bias)", found.shown_first),
        ("agreement where the longer reply is better", found.longer_better),
        ("agreement where the shorter reply is better", found.shorter_better),
        ("expected calibration error", found.ece),
    ]
    console.print(_figure_table([row for row in shares if row[1].n]))
    numbers = [("Cohen's kappa", found.kappa), ("slope of agreement per doubling of length", found.length_slope)]
    console.print(_figure_table([row for row in numbers if row[1].n], as_percent=False))
    if found.aurc is not None:
        curve = ", ".join(f"{risk:.1%} at {coverage:.0%}" for coverage, risk in found.risk_coverage if _is_fifth(coverage))
        _say(console, f"area under the risk-coverage curve {found.aurc:.3f}; error rate at coverage: {curve}")
    _say(console, _threshold_sentence(check))
    _say(console, _calibration_sentence(found.calibration))


def _calibration_sentence(found: LabelCalibration | None) -> str:
    from selfeval.quality.judge_calibration import FEWEST_PAIRS
    from selfeval.report.figures import describe

    if found is None:
        return (
            f"no calibration is fitted: it needs {2 * FEWEST_PAIRS} questions on which people prefer a reply and the judge "
            "calls no tie; and of a judge that does not ask both orders, a run without given values"
        )

    threshold = found.threshold
    keep = (
        f"no threshold has an error rate of at most {threshold.error:.0%}"
        if threshold.value is None
        else f"at this threshold the error rate is at most {threshold.error:.0%} (bound {threshold.bound:.1%}, "
        f"{threshold.coverage.known:.0%} of these pairs)"
    )
    settings = " ".join(f"--set {setting}" for setting in found.settings)
    return (
        f"calibrated on {found.fitted:,} of the labelled pairs, the expected calibration error on the others is "
        f"{describe(found.ece)}, and {describe(found.ece_before)} as recorded; use {settings}: {keep}"
    )


def _is_fifth(coverage: float) -> bool:
    return abs(5 * coverage - round(5 * coverage)) < 0.05


def _threshold_sentence(check: JudgeCheck) -> str:
    from selfeval.quality.selective_risk import fewest_labels

    threshold = check.figures.threshold
    sure = f"at {1 - threshold.delta:.0%} confidence"
    if threshold.value is not None:
        return (
            f"use {check.figures.setting}: the error rate is at most {threshold.error:.0%} {sure} "
            f"(bound {threshold.bound:.1%}, {threshold.selected:,} labelled pairs, {threshold.coverage.known:.0%} of all)"
        )
    fewest, upper = fewest_labels(threshold.error, threshold.delta), threshold.bound
    measured = "" if upper is None else f" (the bound on all {threshold.selected:,} pairs that can be kept is {upper:.1%})"
    return (
        f"no threshold has an error rate of at most {threshold.error:.0%} {sure}{measured}: it takes at least {fewest:,} "
        "labelled pairs above the threshold without an error; label more pairs, raise --error, or use a stronger judge"
    )


def _judge_line(judge: dict[str, Any]) -> str:
    """Return what was measured: the role in a run, or the judge of a model."""
    if judge["run"] is not None:
        named = judge["role"] if judge["role"] == "evaluator" else f"{judge['role']} ({judge['judge']})"
        return f"{named} of {judge['run']}"
    return f"{'referee' if judge['role'] == 'referee' else judge['judge']} of {judge['model']}"


def _say(console: Console, text: str) -> None:
    """Print one sentence. Output to a file is not wrapped."""
    console.print(visible(text), highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _figure_table(rows: Sequence[tuple[str, Figure]], *, as_percent: bool = True) -> Table:
    """Return a table of figures: value, 95 % interval and n."""
    from selfeval.report.figures import cells

    return text_table(
        ("", "value", "95% interval", "n"), [(name, *cells(figure, as_percent=as_percent)) for name, figure in rows]
    )


def _difference(comparison: Comparison) -> str:
    from selfeval.report.figures import describe_difference

    findings = {"better": "better", "worse": "worse", "unclear": "no clear difference", "too_few": "too few questions"}
    return f"{describe_difference(comparison)}: {findings[comparison.finding]}"


def _subset_table(result: JudgeBenchmark) -> Table:
    from selfeval.report.figures import cells

    rows = []
    for name, scores in result.measured.subsets.items():
        value, interval, n = cells(scores.agreement)
        coverage, consistency = cells(scores.coverage)[0], cells(scores.swap_consistency)[0]
        rows.append((visible(name) or "(none)", value, interval, coverage, consistency, n))
    return text_table(("subset", "agreement", "95% interval", "coverage", "orders agree", "n"), rows)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table for the terminal whose first column is aligned to the left and the others to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
