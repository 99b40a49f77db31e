"""Tables of a judge's figures on labelled pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfeval.texts import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from selfeval.judge_benchmark.benchmark import JudgeBenchmark
    from selfeval.quality.comparisons import Comparison
    from selfeval.quality.statistics import Figure

__all__ = ["figure_table", "judge_line", "print_benchmark", "say"]

_NAMES = {"longer": "the longer reply", "first": "the first reply", "mean_logprob": "the higher mean log-probability"}
_LEVEL = {**_NAMES, "chance": "chance level"}


def print_benchmark(result: JudgeBenchmark, console: Console | None = None) -> None:
    """Print the figures of a benchmark on one screen."""
    from rich.console import Console

    console = console or Console()
    measured, scores = result.measured, result.measured.scores
    say(console, f"{judge_line(result.judge)} on {result.data}: {measured.pairs:,} pairs, {measured.ties:,} of them ties")
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
    console.print(figure_table([(name, figure) for name, figure in rows if figure is not None and figure.n]))
    for name, comparison in measured.comparisons.items():
        say(console, f"judge minus {_LEVEL[name]}: {_difference(comparison)}")
    if measured.subsets:
        console.print(_subset_table(result))


def judge_line(judge: dict[str, Any]) -> str:
    """Return what was measured: the role in a run, or the judge of a model."""
    if judge["run"] is not None:
        named = judge["role"] if judge["role"] == "evaluator" else f"{judge['role']} ({judge['judge']})"
        return f"{named} of {judge['run']}"
    return f"{'referee' if judge['role'] == 'referee' else judge['judge']} of {judge['model']}"


def say(console: Console, text: str) -> None:
    """Print one sentence. Output to a file is not wrapped."""
    console.print(visible(text), highlight=False, markup=False, soft_wrap=not console.is_terminal)


def figure_table(rows: Sequence[tuple[str, Figure]], *, as_percent: bool = True) -> Table:
    """Return a table of figures: value, 95 % interval and n."""
    from selfeval.report.figures import cells

    return _table(("", "value", "95% interval", "n"), [(name, *cells(figure, as_percent=as_percent)) for name, figure in rows])


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
    return _table(("subset", "agreement", "95% interval", "coverage", "orders agree", "n"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
