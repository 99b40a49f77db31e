"""Render the page of a run, a self-contained `index.html`, from `report.json` and `metrics/*.jsonl`.

The page makes no network requests: it has no scripts, external fonts or external images, and a Content-Security-Policy forbids
them. Questions and replies are untrusted text, so the template escapes everything except charts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from selfeval.report.reading import Metrics, read_metrics, read_report
from selfeval.report.schema import Report
from selfeval.report.sections import all_sections
from selfeval.store import write_file

__all__ = ["draw_page", "page_template", "render", "render_body"]


def draw_page(run_folder: Path) -> Path:
    """Write `index.html` in a run folder, from its `report.json` and `metrics/` alone.

    The file is replaced atomically, so a browser never reads half a page.

    Args:
        run_folder: folder of a run with a finished report stage.

    Returns:
        The path of the page.

    Raises:
        InputError: the report is missing or malformed, or a metrics file is damaged.
        StorageError: the page cannot be written.
    """
    page = render(read_report(run_folder / "report.json"), read_metrics(run_folder))
    write_file(run_folder / "index.html", page)
    return run_folder / "index.html"


def render(report: Report, metrics: Metrics) -> str:
    """Return the page as a string.

    Args:
        report: the report of a run.
        metrics: rows of each `metrics/<stage>.jsonl`, by stage; any stage and any key may be missing.
    """
    return page_template("index.html.j2").render(all_sections(report, metrics), links={}, main="main")


def render_body(report: Report, metrics: Metrics, links: Mapping[str, str]) -> str:
    """Return the content of the page without its frame, with links in figures, counts and charts.

    Args:
        report: the report of a run.
        metrics: as in `render`.
        links: addresses by field of the report, such as `policy.win_rate` or `policy.watchdogs.0.step`.
    """
    # The frame has a <main>, and a page may have only one.
    return page_template("body.html.j2").render(all_sections(report, metrics), links=links, main="div")


@cache
def page_template(name: str) -> Template:
    """Return a template of this folder; it escapes all text that is not marked as safe."""
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        # A misspelt name in the template is an error, not an empty cell.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
