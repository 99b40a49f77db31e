"""The charts of `charts`, drawn so that a fault in one of them costs that chart and not the page.

A chart that raises is replaced by a note with its name, and the exception is logged with its traceback. The sections of the
page import their charts from here. The exception is a fault of this package: the report itself was read and checked before.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import ParamSpec

from selfeval.report import charts

__all__ = ["bar_chart", "interval_tracks", "line_chart", "reliability_chart", "risk_coverage_chart", "stacked_bar"]

_LOGGER = logging.getLogger(__name__)

P = ParamSpec("P")


def _or_note(draw: Callable[P, str]) -> Callable[P, str]:
    """Return a chart function that writes a note in the place of a chart that raises."""
    signature = inspect.signature(draw)

    @wraps(draw)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            return draw(*args, **kwargs)
        except Exception:  # a chart may fail in any way, and the figures next to it matter more
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
reliability_chart = _or_note(charts.reliability_chart)
risk_coverage_chart = _or_note(charts.risk_coverage_chart)
stacked_bar = _or_note(charts.stacked_bar)
