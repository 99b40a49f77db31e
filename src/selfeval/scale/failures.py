"""The rule for work that fails: three retries, unless the user has to change something.

It is the same in one process and on workers. The package Ray is not needed for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from selfeval.errors import InputError

__all__ = ["RETRIES", "Failure", "retried"]

RETRIES = 3
"""Times that failed work is repeated, so it is tried at most four times."""

R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """Work that failed every time that it was tried.

    Attributes:
        error: the last error.
        traceback: its traceback as text; that of a worker does not survive the way to another process.
        attempts: number of times that the work was tried.
    """

    error: Exception
    traceback: str
    attempts: int


def retried(work: Callable[[], R]) -> R | Failure:
    """Call the work, and repeat it at most `RETRIES` times if it raises.

    Raises:
        InputError: the work raised it. A retry cannot help where the user has to change something.
    """
    for attempt in range(1, RETRIES + 2):
        try:
            return work()
        except InputError:
            raise
        except Exception as error:
            failure = Failure(error, traceback.format_exc(), attempt)
    return failure
