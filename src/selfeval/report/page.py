"""Render the page of a run, a self-contained `index.html`, from `report.json`, `metrics/*.jsonl` and `evaluation/map.json`.

The page makes no network requests: it has no external scripts, fonts or images, and a Content-Security-Policy forbids them.
Its only script shows the texts of the map of the domain, and the policy allows it by its hash. Questions and replies are
untrusted text, so the template escapes everything except charts.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from selfeval.report.map_points import MapPoint, read_map_points
from selfeval.report.reading import Metrics, read_metrics, read_report
from selfeval.report.schema import Report
from selfeval.report.sections import all_sections
from selfeval.store import write_file

__all__ = ["draw_page", "map_script", "page_template", "render", "render_body"]


def draw_page(run_folder: Path) -> Path:
    """Write `index.html` in a run folder, from its `report.json`, `metrics/` and `evaluation/map.json` alone.

    The file is replaced atomically, so a browser never reads half a page.

    Args:
        run_folder: folder of a run with a finished report stage.

    Returns:
        The path of the page.

    Raises:
        InputError: the report is missing or malformed, or the file of a metric or of the map is damaged.
        StorageError: the page cannot be written.
    """
    page = render(read_report(run_folder / "report.json"), read_metrics(run_folder), read_map_points(run_folder))
    write_file(run_folder / "index.html", page)
    return run_folder / "index.html"


def render(report: Report, metrics: Metrics, points: Sequence[MapPoint] = ()) -> str:
    """Return the page as a string.

    Args:
        report: the report of a run.
        metrics: rows of each `metrics/<stage>.jsonl`, by stage; any stage and any key may be missing.
        points: Optional. Points of the map of the domain.
    """
    sections = all_sections(report, metrics, points)
    return page_template("index.html.j2").render(sections, links={}, main="main", **_script(sections))


def _script(sections: Mapping[str, Any]) -> dict[str, str]:
    """Return the script of the map and its hash for the policy of the page; both empty without a map."""
    found = sections["domain_map"]
    text = f"\n{map_script().read_text(encoding='utf-8')}" if found and found["picture"] else ""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() if text else ""
    return {"script": Markup(text), "script_hash": digest}


def map_script() -> Path:
    """Return the path of the script of the map."""
    return Path(__file__).parent / "templates" / "map.js"


def render_body(
    report: Report,
    metrics: Metrics,
    links: Mapping[str, str],
    points: Sequence[MapPoint] = (),
    questions: Mapping[str, str] | None = None,
) -> str:
    """Return the content of the page without its frame, with links in figures, counts and charts.

    Args:
        report: the report of a run.
        metrics: as in `render`.
        links: addresses by field of the report, such as `policy.win_rate` or `policy.watchdogs.0.step`.
        points: Optional. Points of the map of the domain. The page has to load its script, `map_script`.
        questions: Optional. Addresses of the pages of questions by id, to which the points lead. Default: samples of the page.
    """
    # The frame has a <main>, and a page may have only one.
    sections = all_sections(report, metrics, points, questions)
    return page_template("body.html.j2").render(sections, links=links, main="div")


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
