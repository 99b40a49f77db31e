"""The exceptions that this package raises on purpose.

SelfEvalError
├── InputError              invalid user input; exit code 2, one sentence, no traceback
│   ├── ConfigError         a recipe or a --set key or value
│   ├── SeedsError          the seeds file
│   ├── DataError           a file of questions, replies, pairs or gold answers, or documents
│   ├── TextError           the text to tune on
│   ├── ModelError          the model folder or hub id
│   ├── RunFolderError      the output folder: not a run, in use, or damaged
│   │   └── LostWorkError   a stage cannot resume because files of its work are lost; --restart reruns it from its start
│   ├── StorageError        the disk is full or not writable
│   ├── MemoryLimitError    a single sequence exceeds the memory, or the memory budget
│   ├── LoopError           the output of the stages cannot be used (for example: no pair survived judging)
│   │   └── NotFiniteError  a number of training is NaN or infinite
│   ├── ProcessGroupError   the processes of one training disagree, or one was lost too often
│   ├── EndpointError       the server of a judge refuses, cannot be reached, or reached its budget; answers are kept
│   ├── WorkerError         the workers of a run cannot be started, or are lost again and again
│   ├── ExportError         a role cannot be exported as requested: no such role, target not empty, unsupported model kind
│   └── MissingPackageError an optional dependency is not installed; also an ImportError
└── RoleError               incorrect use of roles inside this package; exit code 1

A message states the actual value, the allowed values, and what to do.
"""

from __future__ import annotations

import pickle
from typing import Any

__all__ = [
    "ConfigError",
    "DataError",
    "EndpointError",
    "ExportError",
    "InputError",
    "LoopError",
    "LostWorkError",
    "MemoryLimitError",
    "MissingPackageError",
    "ModelError",
    "NotFiniteError",
    "ProcessGroupError",
    "RoleError",
    "RunFolderError",
    "SeedsError",
    "SelfEvalError",
    "StorageError",
    "TextError",
    "WorkerError",
    "is_out_of_memory",
    "portable",
]


class SelfEvalError(Exception):
    """Base class of all exceptions of this package."""


class InputError(SelfEvalError):
    """User input that cannot be used."""


class ConfigError(InputError):
    """A recipe or a `--set` value is wrong."""


class SeedsError(InputError):
    """The seeds file is empty, malformed or unreadable."""


class DataError(InputError):
    """A file of questions, replies, pairs or gold answers, or a document, is missing or malformed, or does not fit the run."""


class TextError(InputError):
    """The text to tune on is missing, malformed or too short for the model's rows."""


class ModelError(InputError):
    """The model cannot be loaded or cannot be used as a causal language model."""


class RunFolderError(InputError):
    """The output folder is not a run, is used by another process, or is damaged."""


class LostWorkError(RunFolderError):
    """A stage cannot resume because a file of its work is missing or damaged; `--restart` reruns it from its start."""


class StorageError(InputError):
    """The disk is full or cannot be written."""


class MemoryLimitError(InputError):
    """The smallest unit of work does not fit in the available memory."""


class LoopError(InputError):
    """The loop cannot continue with the output of its stages."""


class NotFiniteError(LoopError):
    """A number of training is NaN or infinite. The message names the tensor."""


class ProcessGroupError(InputError):
    """The processes of one training disagree, or one of them was lost too often. Training resumes from its last checkpoint."""


class EndpointError(InputError):
    """The server of a judge refuses requests, cannot be reached, or has cost the budget. The answers so far are kept."""


class WorkerError(InputError):
    """The workers of a run cannot be started, or are lost again and again. Finished shards are kept."""


class ExportError(InputError):
    """A role cannot be exported as requested."""


class MissingPackageError(InputError, ImportError):
    """An optional dependency is not installed.

    Args:
        work: the feature that needs it.
        package: name of the dependency.
        extra: Optional. Extra of this package that installs it. Default: the name of the dependency.
    """

    def __init__(self, work: str, package: str, extra: str = "") -> None:
        extra = extra or package
        super().__init__(f"{work} needs the package {package}; install it with: pip install 'self-evaluator[{extra}]'")
        self.work, self.package, self.extra = work, package, extra

    def __reduce__(self) -> tuple[type[MissingPackageError], tuple[str, str, str], dict[str, Any]]:
        """Pickle the arguments: by default an exception is unpickled from its message alone, which would fail here."""
        return type(self), (self.work, self.package, self.extra), vars(self)  # the notes of `add_note` are among the attributes


class RoleError(SelfEvalError):
    """A role was used in a way that could evaluate or train the wrong weights."""


_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
"""Messages of plain RuntimeErrors raised on out-of-memory by torch's CPU allocator, CUDA, C++ and cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory: Python's MemoryError, torch's on a GPU, or one of a lower library.

    Errors are recognised by class name and message to avoid importing torch.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def portable(error: Exception) -> Exception:
    """Return an error that another process can raise: itself, or a `RuntimeError` with its text and notes.

    An exception is unpickled from its arguments, which those of many libraries cannot be.
    """
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # it may fail in any way
        copy = None
    if type(copy) is type(error):
        return error
    found = RuntimeError(f"{type(error).__name__}: {error}")
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    return found
