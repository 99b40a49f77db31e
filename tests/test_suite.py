"""The settings of the test suite itself."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_files_that_are_distributed_first_exist() -> None:
    source = (TESTS / "conftest.py").read_text(encoding="utf-8")
    listed = re.findall(r'^    "(tests/[^"]+)",$', source, re.MULTILINE)
    assert len(listed) > 5
    assert [path for path in listed if not (TESTS.parent / path).exists()] == []
