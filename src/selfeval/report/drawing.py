"""Fault-tolerant versions of the functions in `charts`: an error in a chart does not break the page.

A chart that raises is replaced by a note with its name, and the exception is logged with its traceback. The sections of the
page import their charts from here. Such an exception is a bug in this package, because the report has been validated before.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import ParamSpec

from selfeval.report import charts
from selfeval.report import map_chart as maps

__all__ = ["bar_chart", "interval_tracks", "line_chart", "map_chart", "reliability_chart", "risk_coverage_chart", "stacked_bar"]

_LOGGER = logging.getLogger(__name__)

P = ParamSpec("P")


def _or_note(draw: Callable[P, str]) -> Callable[P, str]:
    """Wrap a chart function to return a note if it raises."""
    signature = inspect.signature(draw)

    @wraps(draw)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            return draw(*args, **kwargs)
        except Exception:  # whatever the bug is, the rest of the page must be rendered
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            label = str(given.arguments["label"])
            _LOGGER.exception(
                "The chart %r of the report could not be drawn. This is a fault in selfeval: please report it.", label
            )
            return (
                f'<p class="absent">The chart “{escape(label)}” could not be drawn. This is a fault in selfeval, not in the '
                f"run: its figures are in report.json and metrics/.</p>"
            )

    return attempt


bar_chart = _or_note(charts.bar_chart)
interval_tracks = _or_note(charts.interval_tracks)
line_chart = _or_note(charts.line_chart)
map_chart = _or_note(maps.map_chart)
reliability_chart = _or_note(charts.reliability_chart)
risk_coverage_chart = _or_note(charts.risk_coverage_chart)
stacked_bar = _or_note(charts.stacked_bar)
