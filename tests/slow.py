"""Cases of a parametrized test that only `make test-slow` runs."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["slow"]


def slow(*values: Any) -> Any:
    """Return a case of `pytest.mark.parametrize` that is marked slow, because other cases cover the same behavior."""
    return pytest.param(*values, marks=pytest.mark.slow)
