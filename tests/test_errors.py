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
