"""The sandbox, where this system has one."""

from __future__ import annotations

import pytest

from selfeval.errors import ConfigError
from selfeval.execution.sandbox import check_sandbox


@pytest.fixture(scope="session")
def available_sandbox() -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))
