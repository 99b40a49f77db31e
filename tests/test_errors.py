"""The exceptions of this package: those raised in a worker process reach this one unchanged."""

from __future__ import annotations

import inspect
import pickle

import pytest

from selfeval import errors
from selfeval.errors import SelfEvalError

CLASSES = [found for name in errors.__all__ if inspect.isclass(found := getattr(errors, name))]


def _raised(kind: type[SelfEvalError]) -> SelfEvalError:
    """Return an exception with a text for every required argument."""
    _, *parameters = inspect.signature(kind.__init__).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return kind(*(required or ["the seeds file is empty"]))


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_is_pickled_with_its_message_and_notes(kind: type[SelfEvalError]) -> None:
    error = _raised(kind)
    error.add_note("while replies were written")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == str(error) != ""
    assert vars(found) == vars(error)
    assert found.__notes__ == ["while replies were written"]


def test_the_message_of_a_missing_package_says_how_to_install_it() -> None:
    error = pickle.loads(pickle.dumps(errors.MissingPackageError("to_pandas", "pandas")))
    assert str(error) == "to_pandas needs the package pandas; install it with: pip install 'self-evaluator[pandas]'"
