"""Read report.json and metrics/*.jsonl of a run folder; errors for damaged files or other versions name the file and field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from selfeval.errors import InputError
from selfeval.report.schema import SCHEMA, Part, Report
from selfeval.store import open_file
from selfeval.store import read_metrics as read_metrics_file
from selfeval.texts import parse_json

__all__ = ["Metrics", "Rows", "parse_part", "parse_report", "read_metrics", "read_report"]

Rows = Sequence[Mapping[str, Any]]
Metrics = Mapping[str, Rows]
"""Rows of each `metrics/<stage>.jsonl`, by stage."""

P = TypeVar("P", bound=Part)

_REMEDY = "remove evaluation/figures.json in the run folder and rerun the same command, or use the version that wrote it"


def read_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        InputError: the file is missing, is not JSON, has another schema version, or has an invalid field, which the message
            names.
    """
    try:
        with open_file(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: finish the run first; its last stage writes the report") from None
    return parse_report(data, str(path))


def parse_report(data: bytes | str, source: str = "report.json") -> Report:
    """Parse the text of a report.json.

    Args:
        data: JSON.
        source: Optional. Name of the file in error messages.

    Raises:
        InputError: see `read_report`.
    """
    try:
        value = parse_json(data, lenient=True)
    except ValueError as broken:
        raise InputError(f"{source} is not JSON ({broken}): rerun the report stage to regenerate it") from broken
    if not isinstance(value, dict):
        raise InputError(f"{source} must contain a JSON object, got {type(value).__name__}")
    # Before the model is validated, whose messages about missing fields would hide the cause.
    if value.get("schema") != SCHEMA:
        raise InputError(f"{source} has schema {value.get('schema')!r}, this version reads schema {SCHEMA}; {_REMEDY}")
    # From the text again: strict validation accepts arrays as tuples only in JSON mode.
    return parse_part(Report, data, source)


def parse_part(kind: type[P], data: bytes | str, source: str) -> P:
    """Parse JSON as a part of the schema.

    Raises:
        InputError: a field is missing, unknown or invalid; the message names the first one.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as broken:
        raise InputError(f"{source}: {_sentence(broken)}; {_REMEDY}") from broken


def _sentence(broken: ValidationError) -> str:
    """Return the first error as a sentence, with the field and the reason."""
    first = broken.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"'{field}' is missing"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"'{field}' is not a field of schema {SCHEMA}"
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"'{field}' {message}" if field else message


def read_metrics(run_folder: Path) -> Metrics:
    """Read all metrics files of a run folder.

    Raises:
        RunFolderError: a line is damaged; the message names it.
    """
    return {path.stem: read_metrics_file(path) for path in sorted((run_folder / "metrics").glob("*.jsonl"))}
