"""Draw the page of a run: `report.json` and `metrics/*.jsonl` in, one self-contained `index.html` out.

The page makes no network requests: no scripts, no fonts, no images from elsewhere, and a Content-Security-Policy that forbids
them. Questions and replies are untrusted text, so the template escapes everything that a chart did not draw.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from selfeval.report.reading import Metrics, read_metrics, read_report
from selfeval.report.schema import Report
from selfeval.report.sections import all_sections
from selfeval.store import write_file

__all__ = ["draw_page", "render"]


def draw_page(run_folder: Path) -> Path:
    """Draw `index.html` in a run folder, from its `report.json` and `metrics/` alone.

    The page is written atomically: a reader sees the old page or the new one.

    Args:
        run_folder: the folder of a run whose report stage is finished.

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
        metrics: rows by stage, as read from `metrics/<stage>.jsonl`; any stage and any key may be absent.
    """
    return _template().render(all_sections(report, metrics))


@cache
def _template() -> Template:
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html.j2")
