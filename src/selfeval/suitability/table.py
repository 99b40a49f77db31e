"""Print a check on the terminal: one screen."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from selfeval.quality.comparisons import Comparison
from selfeval.quality.statistics import Figure
from selfeval.report.figures import duration, percent, points
from selfeval.suitability.checking import Check
from selfeval.suitability.measures import JudgeMeasures
from selfeval.texts import format_bytes, visible

__all__ = ["print_check"]

_NONE = "-"


def print_check(check: Check, command: str | None, console: Console | None = None) -> None:
    """Print the figures, the cost of a run and the recommendation.

    Args:
        check: the result.
        command: the recommended command; None without a recommendation.
        console: Optional. Default: standard output.
    """
    console = console or Console()
    for line in _sampled(check):
        _say(console, line)
    console.print(_judges(check))
    for line in (*_notes(check), *_cost(check)):
        _say(console, line)
    for line in _recommendation(check, command):
        _say(console, line)


def _say(console: Console, text: str) -> None:
    console.print(visible(text, keep="\n"), highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _sampled(check: Check) -> Iterator[str]:
    questions, replies, sizes = check.measures.questions, check.measures.replies, check.sizes
    ended = ", interrupted" if check.interrupted else ""
    yield (
        f"{check.model}: {sizes['samples']} samples of questions, {sizes['replies']} replies and {sizes['pairs']} pairs in "
        f"{duration(check.seconds)}{ended}"
    )
    if questions.usable is not None:
        drops = ", ".join(f"{reason} {count}" for reason, count in questions.drops.items())
        yield f"Questions: usable {_share(questions.usable)}" + (f"; dropped: {drops}" if drops else "")
    if questions.in_domain is not None:
        yield f"Questions in the domain: {_share(questions.in_domain)}"
    if questions.from_seeds:
        yield f"Replies to {questions.from_seeds} of the seeds too, because fewer questions were usable than needed"
    right = f"; right by gold ({check.gold}): {_share(replies.right)}" if replies.right else ""
    yield f"Replies: cut off {_share(replies.cut)}, in a loop {_share(replies.loops)}{right}"


def _judges(check: Check) -> Table:
    table = Table(title="Judges (value, 95% interval, n)", title_justify="left")
    table.add_column("")
    for judge in check.measures.judges:
        table.add_column(judge.name, overflow="fold")
    rows = [_cells(judge) for judge in check.measures.judges]
    for name in rows[0]:
        cells = [row[name] for row in rows]
        if any(cell != _NONE for cell in cells):
            table.add_row(name, *cells)
    return table


def _cells(judge: JudgeMeasures) -> dict[str, str]:
    probe = judge.probe
    seconds = _NONE if judge.seconds_per_pair is None else f"{judge.seconds_per_pair:.2g} s"
    return {
        "readable verdicts": _share(judge.parsed),
        "orders agree": _share(probe.agreement),
        "chose the reply shown first": _share(probe.shown_first),
        "agrees with itself when repeated": _share(judge.retest),
        "kept": _share(judge.kept),
        "kept labels right by gold": _accuracy(judge.gold),
        "kept labels as the majority": _accuracy(judge.majority),
        "answers depend on the question": _points(judge.votes),
        "best of 2 minus mean reply": _points(judge.gap) + ("" if judge.gap_source is None else f", by {judge.gap_source}"),
        "time per pair": seconds,
    }


def _share(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return _NONE
    if figure.ci_low is None or figure.ci_high is None:
        return f"{percent(figure.value)}, n {figure.n}"
    return f"{percent(figure.value)} [{figure.ci_low:.0%} to {figure.ci_high:.0%}], n {figure.n}"


def _accuracy(test: Comparison | None) -> str:
    """Format a share that was compared with one half."""
    if test is None or test.difference.value is None:
        return _NONE
    d = test.difference
    low, high = (None if bound is None else bound + 0.5 for bound in (d.ci_low, d.ci_high))
    return _share(Figure(d.known + 0.5, low, high, d.n))


def _points(test: Comparison | None) -> str:
    if test is None or test.difference.value is None:
        return _NONE
    d = test.difference
    interval = "" if d.ci_low is None or d.ci_high is None else f" [{d.ci_low * 100:.1f} to {d.ci_high * 100:.1f}]"
    return f"{points(d.known)}{interval}, n {d.n}"


def _notes(check: Check) -> Iterator[str]:
    yield from (f"Note: {note}" for note in check.notes)
    yield from (f"Note: {warning}" for warning in check.decision.warnings)


def _cost(check: Check) -> Iterator[str]:
    if check.memory is not None:
        peaks = ", ".join(f"{format_bytes(d.peak)} on {d.device}" for d in check.memory.devices if d.device != "disk")
        yield f"A run needs {peaks}" + ("." if check.memory.fits else ": it does not fit; see `selfeval plan`.")
    if check.time is not None:
        yield f"One round takes about {duration(check.time.seconds)} on this machine (`selfeval plan --time`)."


def _recommendation(check: Check, command: str | None) -> Iterator[str]:
    decision = check.decision
    if command is not None:
        yield f"\nRecommended: the judge {decision.judge} ({'; '.join(decision.reasons)})."
        yield f"  {command}"
        return
    yield "\nThis model is not shown to judge this domain, because:"
    yield from (f"- {reason}" for reason in decision.reasons)
    yield "This would help:"
    yield from (f"- {remedy}" for remedy in decision.remedies)
