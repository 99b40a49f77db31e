"""Draw the page of a run: `report.json` and `metrics/*.jsonl` in, one self-contained `index.html` out.

The page reaches nothing: no scripts, no fonts, no pictures from elsewhere, and a Content-Security-Policy that forbids
them. Questions and replies are untrusted text, so the template escapes everything that a chart did not draw.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from selfeval.errors import InputError
from selfeval.report.sections import all_sections
from selfeval.store import open_file, parse_json

__all__ = ["SCHEMA", "draw_page", "render"]

SCHEMA = 1
"""The version of report.json that this page can read."""


def draw_page(run_folder: Path) -> Path:
    """Draw `index.html` in a run folder, from its `report.json` and `metrics/` alone.

    The file is written beside its final name and then put in place at once: a reader sees the old page or the new one.

    Args:
        run_folder: the folder of a run whose report stage is finished.

    Returns:
        The path of the page.

    Raises:
        InputError: the report is missing, is not JSON, or has another schema; or a metrics file is broken.
    """
    run_folder = Path(run_folder)
    page = render(_read_report(run_folder / "report.json"), _read_metrics(run_folder / "metrics"))
    return _write_whole(run_folder / "index.html", page)


def render(report: dict[str, Any], metrics: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page as a string.

    Args:
        report: the report of a run, schema 1.
        metrics: rows by stage, as read from `metrics/<stage>.jsonl`; any stage and any key may be absent.

    Raises:
        InputError: the report has another schema, or a part of it has the wrong shape.
    """
    if report.get("schema") != SCHEMA:
        raise InputError(
            f"report.json has schema {report.get('schema')!r}, this version draws schema {SCHEMA}: "
            f"make the report again with this version, or draw it with the one that made it"
        )
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


def _read_report(path: Path) -> dict[str, Any]:
    try:
        with open_file(path) as file:
            report = parse_json(file.read())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: finish the run first, its last stage writes the report") from None
    except ValueError as broken:
        raise InputError(f"{path} is not JSON ({broken}): run the report stage again to write it anew") from broken
    if not isinstance(report, dict):
        raise InputError(f"{path} should hold one JSON object, got {type(report).__name__}")
    return report


def _read_metrics(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: _read_rows(path) for path in sorted(folder.glob("*.jsonl"))}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of one metrics file; a last line without its newline is a write that was cut short, and is not a row."""
    rows = []
    try:
        with open_file(path) as file:
            whole, _, _ = file.read().decode("utf-8").rpartition("\n")
    except UnicodeDecodeError as broken:
        raise InputError(f"{path} is not UTF-8 text ({broken})") from broken
    for order, line in enumerate(whole.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.encode("utf-8"))
        except ValueError as broken:
            raise InputError(f"{path}, line {order}, is not JSON ({broken})") from broken
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {order}, should be a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def _write_whole(path: Path, text: str) -> Path:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            # A model can write half of a surrogate pair, which UTF-8 has no bytes for: it is shown as "?".
            file.write(text.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise
    return path
