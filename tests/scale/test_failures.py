from __future__ import annotations

import pytest

from selfeval.errors import DataError
from selfeval.scale.failures import Failure, retried


class Work:
    """Work that raises a number of times."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


def test_work_is_tried_four_times() -> None:
    work = Work(3, ValueError("no"))
    assert retried(work) == "done"
    assert work.calls == 4
    work = Work(4, ValueError("no"))
    failure = retried(work)
    assert isinstance(failure, Failure)
    assert (failure.error, failure.attempts, work.calls) == (work.error, 4, 4)
    assert failure.traceback.splitlines()[-1] == "ValueError: no"


def test_an_error_of_the_user_is_not_retried() -> None:
    work = Work(1, DataError("use another file"))
    with pytest.raises(DataError, match="use another file"):
        retried(work)
    assert work.calls == 1


def test_an_interruption_is_no_failure() -> None:
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retried(work)
