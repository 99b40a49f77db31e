"""Addresses of the pages of a run."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote, urlencode

from selfeval.serve.page_access import PAGES
from selfeval.view.opened import RunName

__all__ = ["question_address", "record_address", "records_address", "run_address"]


def run_address(run: RunName) -> str:
    """Return the address of a run."""
    return f"{PAGES}/run/{quote(run, safe='~@')}"


def records_address(run: RunName, kind: str, filters: Mapping[str, str]) -> str:
    """Return the address of the selected records of a kind."""
    return f"{run_address(run)}/{kind}{f'?{urlencode(filters)}' if filters else ''}"


def question_address(run: RunName, question: str) -> str:
    """Return the address of the page of a question."""
    return f"{run_address(run)}/question/{quote(question, safe='')}"


def record_address(run: RunName, kind: str, question: str, number: int) -> str:
    """Return the address of a record on the page of its question; empty if it has none.

    Args:
        run: the run.
        kind: kind of the record.
        question: id of the question; empty if it has none.
        number: id of the record in the index.
    """
    # The page shows some records of each kind, this one among them.
    return f"{question_address(run, question)}?show={number}#{kind}-{number}" if question else ""
