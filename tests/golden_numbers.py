"""Numbers that this code did not compute: float64 results of slow loops, checked against public implementations."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "rl_public.json"


def golden(quantity: str) -> dict[str, dict[str, Any]]:
    """Return the entries of a quantity ("4_ppo") by name, each {"inputs", "params", "expected", ...}.

    Skips the test when the file is not there.
    """
    if not FILE.is_file():
        sentence = "the golden numbers are not here: they lie in shared/golden beside the repository"
        pytest.skip(sentence, allow_module_level=True)
    return {entry["name"]: entry for entry in _everything()[quantity]}


@functools.cache
def _everything() -> dict[str, list[dict[str, Any]]]:
    content: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text())
    return content
