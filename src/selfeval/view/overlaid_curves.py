"""Training curves of several runs in the same charts, one colour per run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from selfeval.errors import InputError
from selfeval.report.charts import Line
from selfeval.report.drawing import line_chart
from selfeval.report.sections import CURVES, SMOOTH_FROM, SMOOTHING, column
from selfeval.store import read_metrics
from selfeval.view.compared_runs import ComparedRun
from selfeval.view.drawn import Drawn, version_of

__all__ = ["Overlay", "overlaid_curves"]

_EVALUATOR = (("Evaluator loss", "Bradley-Terry loss on the training pairs.", "loss"),)
_NAME_LETTERS = 18
_DRAWN: Drawn[list[Overlay]] = Drawn(32, share=0.05)


@dataclass(frozen=True)
class Overlay:
    """A chart with a line for each run that has the metric."""

    title: str
    caption: str
    picture: Markup


def overlaid_curves(runs: Sequence[ComparedRun]) -> list[Overlay]:
    """Return the charts of policy and evaluator training, of the metrics that at least one run has."""
    paths = [run.reader.folder / "metrics" / f"{stage}.jsonl" for run in runs for stage in ("policy", "evaluator")]
    return _DRAWN.get(tuple(run.name for run in runs), version_of(paths), lambda: list(_overlays(runs)))


def _overlays(runs: Sequence[ComparedRun]) -> Iterator[Overlay]:
    # The report draws reward and score in one chart; with a line per run, each metric has its chart.
    policy = [
        (title if order == 0 else name.capitalize(), caption if order == 0 else "", key)
        for title, caption, keys in CURVES
        for order, (key, name) in enumerate(keys)
    ]
    for stage, charts in (("policy", policy), ("evaluator", _EVALUATOR)):
        rows = {run.letter: _rows(run.reader.folder / "metrics" / f"{stage}.jsonl") for run in runs}
        for title, caption, key in charts:
            lines = [
                Line(_short(run), points, smoothing=SMOOTHING if len(points) >= SMOOTH_FROM else 0.0, order=order)
                for order, run in enumerate(runs)
                if (points := column(rows[run.letter], key)[0])
            ]
            if len(lines) == 1:  # which has no legend
                caption = f"{caption} Only of {lines[0].name}.".lstrip()
            if lines:
                yield Overlay(title, caption, Markup(line_chart(lines, label=title)))


def _short(run: ComparedRun) -> str:
    name = run.name if len(run.name) <= _NAME_LETTERS else f"{run.name[: _NAME_LETTERS - 1]}…"
    return f"{run.letter}: {name}"


def _rows(path: Path) -> Sequence[dict[str, object]]:
    try:
        return read_metrics(path)
    except InputError:  # the page of the run shows why
        return []
