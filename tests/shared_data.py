"""Public data sets, which are not part of the repository. Tests that read them are skipped where they are absent."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared_lines(name: str) -> list[dict[str, Any]]:
    """Return the objects of a compressed file of JSON lines; skip the test when the file is absent.

    Args:
        name: path in the folder of the data sets, such as `code/mbpp.jsonl.xz`.
    """
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"the data set is not here: shared/data/{name} beside the repository", allow_module_level=True)
    opened = gzip.open if path.suffix == ".gz" else lzma.open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
