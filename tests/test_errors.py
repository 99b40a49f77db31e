from __future__ import annotations

import inspect
import pickle

import pytest

from selfeval import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_comes_back_whole_from_another_process(kind: type[Exception]) -> None:
    """An executor in other processes pickles what its workers raise."""
    count = len(inspect.signature(kind).parameters) if "__init__" in vars(kind) else 1
    error = kind(*["pandas"] * count)
    error.add_note("in shard 3")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == str(error) != ""
    assert vars(found) == vars(error)
    assert found.__notes__ == ["in shard 3"]


class LibraryError(ValueError):
    """Cannot be unpickled: an exception is made again from its message alone."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def test_an_error_that_does_not_survive_pickling_is_replaced_by_one_with_its_text() -> None:
    error = LibraryError("no such key", 7)
    error.add_note("in worker 1 of 2")
    found = errors.portable(error)
    assert repr(found) == "RuntimeError('LibraryError: no such key')"
    assert pickle.loads(pickle.dumps(found)).__notes__ == ["in worker 1 of 2"]
    own = errors.LoopError("no pair survived")
    assert errors.portable(own) is own
